//! Rows that somebody wrote beside the log.

use std::os::unix::fs::FileExt;

use snaptree_tests::daemon::Daemon;
use snaptree_tests::program::Program;

fn state() -> (tempfile::TempDir, Program) {
    let dir = tempfile::tempdir().expect("a folder");
    let program = Program::new(dir.path().join("s"));
    for name in ["web", "db"] {
        program.json(0, &["domain", "add", name, "--driver", "sim"]);
        program.json(0, &["create", name, &format!("{name}-1")]);
    }
    (dir, program)
}

fn forge(program: &Program, sql: &str) {
    let database = rusqlite::Connection::open(program.state.join("snaptree.db")).expect("the database");
    assert_ne!(database.execute(sql, []).expect("it is forged"), 0, "{sql}");
}

/// What verify says differs; the log itself is sound.
fn differences(program: &Program, code: i32) -> Vec<String> {
    let told = program.json(code, &["audit", "verify"]);
    assert!(told["problem"].is_null(), "{told}");
    let differences = told["differences"].as_array().expect("a list");
    differences.iter().map(|difference| difference.as_str().expect("words").to_owned()).collect()
}

fn tells(program: &Program, words: &str) {
    let told = differences(program, 1);
    assert!(told.iter().any(|difference| difference.contains(words)), "{words}: {told:?}");
}

#[test]
fn a7_a_forged_checkpoint_is_told_and_decides_nothing() {
    let (_dir, program) = state();
    let daemon = Daemon::start(&program);
    // A checkpoint is kept every 256 events.
    for round in 0..45 {
        program.json(0, &["create", "web", &format!("s{round}")]);
    }
    daemon.end();
    assert_eq!(differences(&program, 0), Vec::<String>::new());
    forge(&program, "UPDATE checkpoints SET state = replace(state, '\"web-1\"', '\"forged\"')");
    tells(&program, "the checkpoint of domain 'web' is not what its events come to");
    let listed = program.run(&["list", "web"]).stdout;
    assert!(listed.contains("web-1") && !listed.contains("forged"), "{listed}");
    program.json(3, &["delete", "web", "forged"]);
    program.json(0, &["delete", "web", "web-1"]);
}

#[test]
fn a7_a_forged_row_of_domains_is_told_and_decides_nothing() {
    let (_dir, program) = state();
    assert_eq!(differences(&program, 0), Vec::<String>::new());
    // Names that are exchanged would have the other's snapshots deleted.
    forge(&program, "UPDATE domains SET name = CASE name WHEN 'web' THEN 'db' ELSE 'web' END");
    tells(&program, "read model domains");
    program.json(3, &["delete", "web", "db-1"]);
    program.json(0, &["delete", "web", "web-1"]);
    program.json(0, &["list", "db"]);
}

#[test]
fn a_a_row_that_is_made_up_or_missing_is_told_and_changes_nothing() {
    let (_dir, program) = state();
    forge(
        &program,
        "INSERT INTO domains SELECT '0190f7a4-9d4e-7cc0-8f3e-2b5f1c7a9d10', 'ghost', driver, current, labels,
            registered_at, NULL, seq FROM domains LIMIT 1",
    );
    tells(&program, "is not what the log says");
    program.json(3, &["list", "ghost"]);
    let listed = program.json(0, &["domain", "list"]).to_string();
    assert!(!listed.contains("ghost"), "{listed}");
    program.json(0, &["domain", "add", "ghost", "--driver", "sim"]);
    // Neither is a name free because its row is gone, nor is its domain.
    forge(&program, "DELETE FROM domains WHERE name = 'web'");
    tells(&program, "is in the log and is missing or changed");
    assert_eq!(program.json(4, &["domain", "add", "web", "--driver", "sim"])["error"]["code"], "exists");
    program.json(0, &["delete", "web", "web-1"]);
    for (table, sql) in [
        ("snapshots", "UPDATE snapshots SET name = 'other'"),
        ("operations", "UPDATE operations SET outcome = 'failed'"),
    ] {
        forge(&program, sql);
        tells(&program, &format!("read model {table}"));
    }
    // Made again, all is well.
    forge(&program, "DELETE FROM read_model");
    program.json(0, &["create", "web", "s2"]);
    assert_eq!(differences(&program, 0), Vec::<String>::new());
}

#[test]
fn a7_a_write_ahead_log_that_breaks_off_is_told() {
    let (_dir, program) = state();
    let daemon = Daemon::start(&program);
    for round in 0..4 {
        program.json(0, &["create", "web", &format!("s{round}")]);
    }
    daemon.kill();
    assert_eq!(differences(&program, 0), Vec::<String>::new());
    let wal = std::fs::File::options().read(true).write(true).open(program.state.join("snaptree.db-wal"));
    let wal = wal.expect("the write-ahead log");
    let at = wal.metadata().expect("its length").len() / 2;
    let mut byte = [0];
    wal.read_exact_at(&mut byte, at).expect("a byte");
    wal.write_all_at(&[byte[0] ^ 1], at).expect("it is damaged");
    tells(&program, "the write-ahead log breaks off");
}

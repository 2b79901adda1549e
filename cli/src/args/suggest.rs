//! What someone perhaps meant who wrote a command that there is not: other programs' words for it first, then what is
//! written nearly alike.

use std::ffi::OsString;

use clap::Command;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use snaptree_engine::near::nearest;

/// Words of virsh, virt-manager, VBoxManage, git, restic and shells, and the command here.
const WORDS: [(&str, &[&str]); 47] = [
    ("add", &["create", "domain add"]),
    ("attach", &["domain add"]),
    ("checkout", &["revert"]),
    ("clone", &["domain add"]),
    ("commit", &["reconcile", "delete"]),
    ("consolidate", &["reconcile"]),
    ("daemon", &["serve"]),
    ("define", &["domain add"]),
    ("del", &["delete"]),
    ("destroy", &["delete", "domain stop"]),
    ("diff", &["drift"]),
    ("domains", &["domain list"]),
    ("dumpxml", &["xml"]),
    ("events", &["log"]),
    ("fix", &["recover"]),
    ("graph", &["tree"]),
    ("history", &["log"]),
    ("import", &["domain add"]),
    ("info", &["show"]),
    ("jobs", &["op list"]),
    ("lock", &["hold"]),
    ("ls", &["list"]),
    ("merge", &["reconcile", "delete"]),
    ("new", &["create", "domain add"]),
    ("operations", &["op list"]),
    ("pin", &["hold"]),
    ("policies", &["policy list"]),
    ("protect", &["hold"]),
    ("prune", &["policy run", "delete"]),
    ("register", &["domain add"]),
    ("remove", &["delete", "domain remove"]),
    ("rename", &["edit"]),
    ("repair", &["recover"]),
    ("reset", &["revert"]),
    ("restore", &["revert"]),
    ("retry", &["op retry"]),
    ("rm", &["delete", "remove"]),
    ("rollback", &["revert"]),
    ("save", &["create"]),
    ("shutdown", &["domain stop"]),
    ("snap", &["create"]),
    ("snapshot", &["create"]),
    ("start", &["domain start"]),
    ("status", &["op list", "domain list"]),
    ("stop", &["domain stop"]),
    ("take", &["create"]),
    ("undo", &["revert"]),
];

/// The same error with a suggestion that helps, or with none.
pub fn improved(mut error: clap::Error, root: &Command, words: &[OsString]) -> clap::Error {
    if error.kind() != ErrorKind::InvalidSubcommand {
        return error;
    }
    let Some(ContextValue::String(given)) = error.get(ContextKind::InvalidSubcommand) else { return error };
    let suggested = suggested(&given.clone(), parent(root, words), root);
    error.remove(ContextKind::SuggestedSubcommand);
    if !suggested.is_empty() {
        error.insert(ContextKind::SuggestedSubcommand, ContextValue::Strings(suggested));
    }
    error
}

/// The command whose subcommand was looked for: as deep as the words lead.
fn parent<'a>(root: &'a Command, words: &[OsString]) -> &'a Command {
    let mut command = root;
    for word in words.iter().skip(1).filter_map(|word| word.to_str()) {
        if let Some(deeper) = command.find_subcommand(word) {
            command = deeper;
        }
    }
    command
}

fn suggested(given: &str, parent: &Command, root: &Command) -> Vec<String> {
    let lower = given.to_ascii_lowercase();
    let word = lower.strip_prefix("snapshot-").unwrap_or(&lower);
    let names = || parent.get_subcommands().filter(|command| !command.is_hide_set()).map(Command::get_name);
    if let Some(same) = names().find(|name| *name == word) {
        return vec![same.to_owned()];
    }
    let of_word = WORDS.iter().find(|(known, _)| *known == word).map_or(&[][..], |(_, commands)| commands);
    let here = of_word.iter().filter(|command| exists(parent, command));
    let there = of_word.iter().filter(|command| exists(root, command));
    let found: Vec<String> = here.map(|command| (*command).to_owned()).collect();
    if !found.is_empty() {
        return found;
    }
    let found: Vec<String> = there.map(|command| format!("snaptree {command}")).collect();
    if !found.is_empty() {
        return found;
    }
    nearest(word, names()).map(str::to_owned).into_iter().collect()
}

/// Whether a path of commands leads somewhere from here.
fn exists(from: &Command, path: &str) -> bool {
    path.split(' ').try_fold(from, |command, word| command.find_subcommand(word)).is_some()
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::args::Cli;

    #[test]
    fn other_programs_words_lead_to_the_command_and_typing_errors_to_the_nearest() {
        let root = Cli::command();
        let domain = root.find_subcommand("domain").unwrap();
        for (given, parent, meant) in [
            ("restore", &root, "revert"),
            ("rollback", &root, "revert"),
            ("undo", &root, "revert"),
            ("rm", &root, "delete"),
            ("snapshot-list", &root, "list"),
            ("snapshot-dumpxml", &root, "xml"),
            ("craete", &root, "create"),
            ("rm", domain, "remove"),
            ("start", &root, "domain start"),
            ("restore", domain, "snaptree revert"),
        ] {
            assert_eq!(suggested(given, parent, &root).first().map(String::as_str), Some(meant), "{given}");
        }
        assert!(suggested("xyzzy", &root, &root).is_empty());
    }

    #[test]
    fn every_suggestion_exists() {
        let root = Cli::command();
        for (word, commands) in WORDS {
            assert!(root.find_subcommand(word).is_none(), "{word} is a command itself");
            for command in commands {
                let somewhere =
                    exists(&root, command) || root.get_subcommands().any(|parent| exists(parent, command));
                assert!(somewhere, "{word}: there is no {command}");
            }
        }
        assert!(WORDS.is_sorted_by_key(|(word, _)| *word));
    }
}

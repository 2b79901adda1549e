//! Settings: `/etc/snaptree/config.toml`, then `$XDG_CONFIG_HOME/snaptree/config.toml`.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use snaptree_drivers::esx::CallTimes;
use snaptree_drivers::qemu::{LeftOut, ToolTimes};
use snaptree_drivers::virtualbox::PROGRAM;
use snaptree_engine::engine::{Foreign, Settings};
use snaptree_engine::near::nearest;
use toml::{Table, Value};

use crate::args::value::{bytes, duration};
use crate::exit::{Exit, Trouble};

/// Largest settings file that is read.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// How often the daemon looks for drift if nothing is set.
const DRIFT_EVERY_DEFAULT: Duration = Duration::from_secs(15 * 60);

/// Every setting: table, key, and what is written there.
const KNOWN: &[(&str, &str, &str)] = &[
    ("concurrency", "overall", "a number from 1"),
    ("concurrency", "per-connection", "a number from 1"),
    ("drift", "every", "a duration, such as \"15m\"; \"0s\" for never"),
    ("drift", "foreign", "\"adopt\" or \"report\""),
    ("esx", "connect-timeout", "a duration above 0, such as \"10s\""),
    ("esx", "call-timeout", "a duration above 0, such as \"60s\""),
    ("merge", "copy-max", "a size, such as \"4 GiB\""),
    ("qemu", "tool-timeout", "a duration above 0, such as \"30s\""),
    ("qemu", "copy-timeout", "a duration above 0, such as \"24h\""),
    ("qemu", "start-timeout", "a duration above 0, such as \"60s\""),
    ("qemu", "job-speed", "a size a second, such as \"100 MiB/s\"; 0 for no limit"),
    ("qemu", "left-out-disks", "\"warn\" or \"refuse\""),
    ("operation", "deadline", "a duration, such as \"1h\"; \"0s\" for none"),
    ("retry", "attempts", "a number from 1"),
    ("retry", "delay-min", "a duration, such as \"200ms\""),
    ("retry", "delay-max", "a duration, such as \"30s\""),
    ("space", "margin", "a size, such as \"64 MiB\""),
    ("virtualbox", "manage", "the program VBoxManage, by its name or an absolute path"),
    ("serve", "socket", "an absolute path, such as \"/run/snaptree/snaptree.sock\""),
];

/// The settings in force, and the files that they come from.
#[derive(Clone, Debug)]
pub struct Config {
    /// The settings.
    pub settings: Settings,
    /// How long qemu-img may take.
    pub qemu: ToolTimes,
    /// How long calls to hosts may take.
    pub esx: CallTimes,
    /// How many bytes a second a merge may move; 0 for no limit.
    pub job_speed_bytes: u64,
    /// What is done about media that a machine writes and that are no disks of its domain.
    pub left_out_disks: LeftOut,
    /// The VBoxManage that is called.
    pub manage: PathBuf,
    /// Where the daemon listens, if it is said.
    pub socket: Option<PathBuf>,
    /// How often the daemon looks for drift, domain by domain; none for never.
    pub drift_every: Option<Duration>,
    /// The files that were there, in the order in which they were read.
    pub files: Vec<PathBuf>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            settings: Settings::default(),
            qemu: ToolTimes::default(),
            esx: CallTimes::default(),
            job_speed_bytes: 0,
            left_out_disks: LeftOut::default(),
            manage: PathBuf::from(std::env::var_os("VBOXMANAGE").unwrap_or_else(|| PROGRAM.into())),
            socket: None,
            drift_every: Some(DRIFT_EVERY_DEFAULT),
            files: Vec::new(),
        }
    }
}

impl Config {
    /// Reads the files of this installation and user.
    ///
    /// # Errors
    /// A file cannot be read, or says what no setting says.
    pub fn load() -> Result<Self> {
        let mut config = Self::default();
        for file in files() {
            config.add(&file)?;
        }
        Ok(config)
    }

    /// Adds a file, if it is there; what it says takes the place of what was said before.
    ///
    /// # Errors
    /// It cannot be read, or says what no setting says.
    pub fn add(&mut self, file: &Path) -> Result<()> {
        match fs::metadata(file) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", file.display())),
            Ok(found) if found.len() > FILE_BYTES_MAX => {
                return Err(trouble(file, &format!("it is larger than {FILE_BYTES_MAX} bytes")).into());
            }
            Ok(_) => {}
        }
        let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        self.read(&text).map_err(|problem| trouble(file, &problem))?;
        self.files.push(file.to_owned());
        Ok(())
    }

    /// Reads the text of a file.
    fn read(&mut self, text: &str) -> Result<(), String> {
        let document: Table = text.parse().map_err(|error: toml::de::Error| {
            let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
            format!("line {}: {}", before.matches('\n').count() + 1, error.message())
        })?;
        for (table, value) in &document {
            let Some(entries) = value.as_table().filter(|_| KNOWN.iter().any(|known| known.0 == table))
            else {
                return Err(unknown(table, KNOWN.iter().map(|known| known.0.to_owned())));
            };
            for (key, value) in entries {
                let known = KNOWN.iter().find(|known| known.0 == table && known.1 == key);
                let Some(known) = known else {
                    let all = KNOWN.iter().map(|known| format!("{}.{}", known.0, known.1));
                    return Err(unknown(&format!("{table}.{key}"), all));
                };
                self.set(known.0, known.1, value)
                    .ok_or_else(|| format!("{table}.{key} is {value}, and should be {}", known.2))?;
            }
        }
        let settings = &self.settings;
        if settings.retry_delay_ms_min > settings.retry_delay_ms_max {
            return Err("retry.delay-min is longer than retry.delay-max".to_owned());
        }
        Ok(())
    }

    /// Sets one value; `None` if it is not of the right kind.
    fn set(&mut self, table: &str, key: &str, value: &Value) -> Option<()> {
        let settings = &mut self.settings;
        match (table, key) {
            ("drift", "foreign") => {
                settings.foreign = match value.as_str()? {
                    "adopt" => Foreign::Adopt,
                    "report" => Foreign::Report,
                    _ => return None,
                }
            }
            ("drift", "every") => {
                let every = duration(value.as_str()?).ok()?;
                self.drift_every = Some(every).filter(|every| !every.is_zero());
            }
            ("concurrency", "overall") => settings.concurrency_max = count_of(value)?,
            ("concurrency", "per-connection") => settings.concurrency_per_connection_max = count_of(value)?,
            ("merge", "copy-max") => settings.merge_copy_bytes_max = size_of(value)?,
            ("operation", "deadline") => {
                let seconds = millis_of(value)? / 1_000;
                settings.first_step_s_max = Some(seconds).filter(|seconds| *seconds > 0);
            }
            ("retry", "attempts") => {
                let attempts = u32::try_from(value.as_integer()?).ok()?;
                settings.attempts_max = Some(attempts).filter(|attempts| *attempts > 0)?;
            }
            ("qemu", "tool-timeout") => self.qemu.header = wait_of(value)?,
            ("qemu", "copy-timeout") => self.qemu.copy = wait_of(value)?,
            ("qemu", "start-timeout") => self.qemu.start = wait_of(value)?,
            ("qemu", "job-speed") => self.job_speed_bytes = speed_of(value)?,
            ("qemu", "left-out-disks") => {
                self.left_out_disks = match value.as_str()? {
                    "warn" => LeftOut::Warn,
                    "refuse" => LeftOut::Refuse,
                    _ => return None,
                }
            }
            ("esx", "connect-timeout") => self.esx.connect = wait_of(value)?,
            ("esx", "call-timeout") => self.esx.call = wait_of(value)?,
            ("space", "margin") => settings.space_margin_bytes = size_of(value)?,
            ("virtualbox", "manage") => {
                let program = value.as_str().filter(|program| !program.is_empty())?;
                // The environment is nearer than a file.
                if std::env::var_os("VBOXMANAGE").is_none() {
                    self.manage = PathBuf::from(program);
                }
            }
            ("retry", "delay-min") => settings.retry_delay_ms_min = millis_of(value)?,
            ("serve", "socket") => {
                let path = PathBuf::from(value.as_str()?);
                self.socket = Some(path).filter(|path| path.is_absolute());
                self.socket.as_ref()?;
            }
            ("retry", "delay-max") => settings.retry_delay_ms_max = millis_of(value)?,
            _ => return None,
        }
        Some(())
    }
}

fn size_of(value: &Value) -> Option<u64> {
    match value {
        Value::Integer(number) => u64::try_from(*number).ok(),
        Value::String(text) => bytes(text).ok(),
        _ => None,
    }
}

/// A size a second; the `/s` may be left out.
fn speed_of(value: &Value) -> Option<u64> {
    match value {
        Value::String(text) => bytes(text.strip_suffix("/s").unwrap_or(text)).ok(),
        other => size_of(other),
    }
}

fn count_of(value: &Value) -> Option<usize> {
    usize::try_from(value.as_integer()?).ok().filter(|count| *count > 0)
}

fn millis_of(value: &Value) -> Option<u64> {
    let given = duration(value.as_str()?).ok()?;
    u64::try_from(given.as_millis()).ok()
}

fn wait_of(value: &Value) -> Option<Duration> {
    duration(value.as_str()?).ok().filter(|wait| !wait.is_zero())
}

fn trouble(file: &Path, problem: &str) -> Trouble {
    Trouble::new(Exit::Failed, "config", format!("{}: {}", file.display(), problem.trim_end()))
        .hint("`snaptree config show` lists every setting; `snaptree config check` checks the files")
}

fn unknown(given: &str, known: impl Iterator<Item = String>) -> String {
    let known: Vec<String> = known.collect();
    let near = nearest(given, known.iter().map(String::as_str));
    let mut names = known.clone();
    names.dedup();
    match near {
        Some(near) => format!("there is no setting '{given}'; did you mean '{near}'?"),
        None => format!("there is no setting '{given}'; there are {}", names.join(", ")),
    }
}

/// The files, in the order in which they count.
pub fn files() -> Vec<PathBuf> {
    let mut files = vec![PathBuf::from("/etc/snaptree/config.toml")];
    let home = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    if let Some(base) = home("XDG_CONFIG_HOME").or_else(|| home("HOME").map(|home| home.join(".config"))) {
        files.push(base.join("snaptree/config.toml"));
    }
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Settings, String> {
        let mut config = Config::default();
        config.read(text).map(|()| config.settings)
    }

    #[test]
    fn settings_are_read() {
        let text = "[concurrency]\noverall = 100\nper-connection = 20\n[drift]\nforeign = \"report\"\n[merge]\ncopy-max = \"1 GiB\"\n[operation]\ndeadline = \"2h\"\n[retry]\nattempts = 3\ndelay-min = \"1s\"\ndelay-max = \"2m\"\n[space]\nmargin = \"1 MiB\"\n";
        let expected = Settings {
            merge_copy_bytes_max: 1 << 30,
            space_margin_bytes: 1 << 20,
            attempts_max: 3,
            retry_delay_ms_min: 1_000,
            retry_delay_ms_max: 120_000,
            first_step_s_max: Some(7_200),
            foreign: Foreign::Report,
            concurrency_max: 100,
            concurrency_per_connection_max: 20,
        };
        assert_eq!(read(text), Ok(expected));
        assert_eq!(read(""), Ok(Settings::default()));
    }

    #[test]
    fn how_often_drift_is_looked_for_is_read() {
        for (text, every) in [
            ("", Some(DRIFT_EVERY_DEFAULT)),
            ("[drift]\nevery = \"1h\"", Some(Duration::from_secs(3_600))),
            ("[drift]\nevery = \"0s\"", None),
        ] {
            let mut config = Config::default();
            config.read(text).unwrap();
            assert_eq!(config.drift_every, every, "{text}");
        }
    }

    #[test]
    fn the_times_of_tools_are_read() {
        let mut config = Config::default();
        config.read("[qemu]\ntool-timeout = \"2s\"\ncopy-timeout = \"1h\"\nstart-timeout = \"5s\"").unwrap();
        assert_eq!(
            config.qemu,
            ToolTimes {
                header: Duration::from_secs(2),
                copy: Duration::from_secs(3_600),
                start: Duration::from_secs(5)
            }
        );
    }

    #[test]
    fn the_speed_of_merges_is_read() {
        for (text, speed) in [
            ("", 0),
            ("[qemu]\njob-speed = 0", 0),
            ("[qemu]\njob-speed = 4096", 4_096),
            ("[qemu]\njob-speed = \"100MiB/s\"", 100 << 20),
            ("[qemu]\njob-speed = \"2 GB\"", 2_000_000_000),
        ] {
            let mut config = Config::default();
            config.read(text).unwrap();
            assert_eq!(config.job_speed_bytes, speed, "{text}");
        }
    }

    #[test]
    fn what_is_unknown_is_refused_with_the_nearest_name() {
        for (text, says) in [
            ("[merge]\ncopymax = 1", "there is no setting 'merge.copymax'; did you mean 'merge.copy-max'?"),
            ("[retry]\nattempt = 1", "did you mean 'retry.attempts'?"),
            ("[merg]\ncopy-max = 1", "there is no setting 'merg'; did you mean 'merge'?"),
            (
                "[something-else]",
                "there are concurrency, drift, esx, merge, qemu, operation, retry, space, virtualbox, serve",
            ),
            ("merge = 1", "there is no setting 'merge'"),
        ] {
            let problem = read(text).unwrap_err();
            assert!(problem.contains(says), "{problem}");
        }
    }

    #[test]
    fn values_of_another_kind_are_refused() {
        for (text, says) in [
            ("[merge]\ncopy-max = \"lots\"", "merge.copy-max is \"lots\", and should be a size"),
            ("[merge]\ncopy-max = -1", "should be a size"),
            ("[qemu]\njob-speed = \"fast\"", "should be a size a second"),
            ("[qemu]\njob-speed = \"10 MiB/min\"", "should be a size a second"),
            ("[space]\nmargin = \"5%\"", "space.margin is \"5%\", and should be a size"),
            ("[concurrency]\noverall = 0", "should be a number from 1"),
            ("[qemu]\ntool-timeout = \"0s\"", "should be a duration above 0"),
            ("[retry]\nattempts = 0", "should be a number from 1"),
            ("[retry]\ndelay-min = 5", "should be a duration"),
            ("[retry]\ndelay-min = \"1m\"\ndelay-max = \"1s\"", "longer than"),
            ("[merge]\ncopy-max = 1\n[retry", "line 3: "),
        ] {
            let problem = read(text).unwrap_err();
            assert!(problem.contains(says), "{problem}");
        }
    }
}

//! Who runs the machine, and how it is reached while it runs.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use snaptree_engine::DiskName;
use snaptree_engine::operation::{Code, Failure};

/// Longest command that a user may register, in bytes.
const COMMAND_BYTES_MAX: usize = 32 << 10;
/// What a UNIX socket's address holds, without the closing zero.
pub(super) const SOCKET_PATH_BYTES_MAX: usize = 107;

/// What a user says of it: part of [`QemuOptions`](super::QemuOptions).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RunsWish {
    /// QEMU's QMP socket.
    pub qmp: Option<PathBuf>,
    /// A command that starts the machine, for `sh -c`. It is kept in the log: no place for secrets.
    pub start: Option<String>,
    /// A command that ends the machine, for `sh -c`.
    pub stop: Option<String>,
    /// QEMU's command line with placeholders, split as a shell would.
    pub launch: Option<String>,
}

/// Who runs the machine: part of [`QemuConfig`](super::QemuConfig).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "by", rename_all = "kebab-case")]
pub enum Runs {
    /// Somebody else, and it is not reached: nothing is done while it runs.
    #[default]
    Apart,
    /// Somebody else; it is reached by QMP.
    Attached {
        /// QEMU's QMP socket.
        qmp: PathBuf,
    },
    /// Two commands of the user's.
    Commands {
        /// Starts it.
        start: String,
        /// Ends it.
        stop: String,
        /// QEMU's QMP socket; without one nothing is done while it runs, but to end it.
        qmp: Option<PathBuf>,
    },
    /// Snaptree starts and ends it. It outlives Snaptree, and is found again by socket and pid file.
    Managed {
        /// QEMU's command line with placeholders.
        launch: String,
        /// Where it is told to make its QMP socket.
        qmp: PathBuf,
        /// Where it is told to write its process id.
        pid_file: PathBuf,
    },
}

impl RunsWish {
    /// Whether nothing is wished.
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// What `now` becomes by this wish: what it leaves out stays, an empty value takes away, and a launch command and the
    /// ways of somebody else's exclude each other.
    pub(super) fn over(&self, now: &Runs) -> Self {
        if self.is_empty() {
            return Self::from(now);
        }
        let before = match (&self.launch, now) {
            (Some(_), _) | (None, Runs::Managed { .. }) => Self::default(),
            (None, now) => Self::from(now),
        };
        let word = |wish: &Option<String>, before: Option<String>| {
            wish.clone().or(before).filter(|word| !word.is_empty())
        };
        Self {
            qmp: self.qmp.clone().or(before.qmp).filter(|socket| !socket.as_os_str().is_empty()),
            start: word(&self.start, before.start),
            stop: word(&self.stop, before.stop),
            launch: word(&self.launch, before.launch),
        }
    }
}

impl From<&Runs> for RunsWish {
    fn from(runs: &Runs) -> Self {
        match runs {
            Runs::Apart => Self::default(),
            Runs::Attached { qmp } => Self { qmp: Some(qmp.clone()), ..Self::default() },
            Runs::Commands { start, stop, qmp } => {
                let (start, stop) = (Some(start.clone()), Some(stop.clone()));
                Self { qmp: qmp.clone(), start, stop, launch: None }
            }
            Runs::Managed { launch, .. } => Self { launch: Some(launch.clone()), ..Self::default() },
        }
    }
}

impl Runs {
    /// QEMU's QMP socket.
    pub fn qmp(&self) -> Option<&Path> {
        match self {
            Self::Apart => None,
            Self::Attached { qmp } | Self::Managed { qmp, .. } => Some(qmp),
            Self::Commands { qmp, .. } => qmp.as_deref(),
        }
    }

    /// Whether Snaptree may start and end the machine.
    pub fn can_start(&self) -> bool {
        matches!(self, Self::Commands { .. } | Self::Managed { .. })
    }

    /// Whether it is as if nothing were said.
    pub(super) fn is_apart(&self) -> bool {
        *self == Self::Apart
    }

    /// What becomes of a wish; `stem` is the path, without ending, of what a managed machine leaves beside itself.
    pub(super) fn of(wish: &RunsWish, disks: &[&DiskName], stem: &Path) -> Result<Self, Failure> {
        let invalid = |message: &str| Failure::new(Code::Invalid, message).refused();
        match (&wish.launch, &wish.start, &wish.stop, &wish.qmp) {
            (Some(_), _, _, Some(_)) => {
                Err(invalid("a launch command gets its QMP socket from Snaptree: leave out --qmp"))
            }
            (Some(_), Some(_), ..) | (Some(_), _, Some(_), _) => Err(invalid(
                "--launch cannot go with --start and --stop: either Snaptree runs QEMU or commands do",
            )),
            (None, Some(_), None, _) | (None, None, Some(_), _) => {
                Err(invalid("--start and --stop go together"))
            }
            (Some(launch), None, None, None) => {
                check_command(launch)?;
                let mut qmp = stem.as_os_str().to_os_string();
                let mut pid_file = qmp.clone();
                qmp.push(".qmp");
                pid_file.push(".pid");
                let (qmp, pid_file) = (PathBuf::from(qmp), PathBuf::from(pid_file));
                if qmp.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
                    return Err(invalid(&format!(
                        "the path of the QMP socket {} is longer than the {SOCKET_PATH_BYTES_MAX} bytes that a \
                         socket's may have",
                        qmp.display()
                    ))
                    .hint("--state with a shorter path"));
                }
                check_launch(launch, disks)?;
                Ok(Self::Managed { launch: launch.clone(), qmp, pid_file })
            }
            (None, Some(start), Some(stop), qmp) => {
                check_command(start)?;
                check_command(stop)?;
                Ok(Self::Commands { start: start.clone(), stop: stop.clone(), qmp: qmp.clone() })
            }
            (None, None, None, Some(qmp)) => Ok(Self::Attached { qmp: qmp.clone() }),
            (None, None, None, None) => Ok(Self::Apart),
        }
    }
}

fn check_command(command: &str) -> Result<(), Failure> {
    if command.trim().is_empty() || command.len() > COMMAND_BYTES_MAX || command.contains('\0') {
        return Err(Failure::new(
            Code::Invalid,
            format!("a command has 1 to {COMMAND_BYTES_MAX} bytes, and no zero byte"),
        )
        .refused());
    }
    Ok(())
}

/// Whether a machine boots, or waits for its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Incoming {
    /// It boots.
    No,
    /// It waits until it is told where its memory comes from.
    Defer,
}

/// What a placeholder of a launch command stands for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Values<'a> {
    /// The resolved file of each disk.
    pub(super) disks: &'a BTreeMap<DiskName, PathBuf>,
    /// The QMP socket.
    pub(super) qmp: &'a Path,
    /// The pid file.
    pub(super) pid_file: &'a Path,
    /// What `{incoming}` stands for.
    pub(super) incoming: Incoming,
}

/// Splits a launch command as a shell would, and puts in what the placeholders stand for.
///
/// A word that is `{incoming}` alone vanishes, or becomes `-incoming defer`, which is added at the end where there is no
/// such word. Braces around anything else stay as they are, since QEMU's JSON
/// options have some.
pub(super) fn command_line(launch: &str, values: Values<'_>) -> Result<Vec<String>, Failure> {
    let words = shell_words::split(launch).map_err(|_| {
        Failure::new(Code::Invalid, "the launch command has a quote that is not closed").refused()
    })?;
    let mut placed = Vec::new();
    let mut defer = match values.incoming {
        Incoming::No => None,
        Incoming::Defer => Some(["-incoming".to_owned(), "defer".to_owned()]),
    };
    for word in words {
        if word == "{incoming}" {
            placed.extend(defer.take().into_iter().flatten());
        } else {
            placed.push(fill(&word, values)?);
        }
    }
    placed.extend(defer.into_iter().flatten());
    if placed.is_empty() {
        return Err(Failure::new(Code::Invalid, "the launch command is empty").refused());
    }
    Ok(placed)
}

/// How a word of the command writes a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spelling {
    /// As it is.
    Plain,
    /// In QEMU's `key=value,...`, where a comma in a value is written twice.
    Options,
    /// In JSON.
    Json,
}

impl Spelling {
    fn of(word: &str) -> Self {
        if word.trim_start().starts_with('{') && word.contains('"') {
            Self::Json
        } else if word.contains(['=', ',']) || word.starts_with("unix:") {
            Self::Options
        } else {
            Self::Plain
        }
    }

    fn write(self, path: &Path) -> Result<String, Failure> {
        let text = path.to_str().filter(|text| !text.contains(char::is_control)).ok_or_else(|| {
            Failure::new(
                Code::Unsupported,
                format!("{} cannot be put into a launch command: it is no plain text", path.display()),
            )
            .refused()
        })?;
        Ok(match self {
            Self::Plain => text.to_owned(),
            Self::Options => text.replace(',', ",,"),
            Self::Json => text.replace('\\', "\\\\").replace('"', "\\\""),
        })
    }
}

fn fill(word: &str, values: Values<'_>) -> Result<String, Failure> {
    let spelling = Spelling::of(word);
    let mut filled = String::with_capacity(word.len());
    let mut rest = word;
    while let Some((before, from)) = rest.split_once('{') {
        filled.push_str(before);
        let Some((name, after)) = from.split_once('}') else {
            filled.push('{');
            rest = from;
            continue;
        };
        let path = match name {
            "qmp" => Some(values.qmp),
            "pidfile" => Some(values.pid_file),
            name => match name.strip_suffix(".format") {
                Some(disk) if values.disks.keys().any(|known| known.as_str() == disk) => {
                    filled.push_str("qcow2");
                    rest = after;
                    continue;
                }
                _ => values
                    .disks
                    .iter()
                    .find(|(known, _)| known.as_str() == name)
                    .map(|(_, file)| file.as_path()),
            },
        };
        match path {
            Some(path) => {
                filled.push_str(&spelling.write(path)?);
                rest = after;
            }
            None => {
                filled.push('{');
                rest = from;
            }
        }
    }
    filled.push_str(rest);
    Ok(filled)
}

/// The placeholders that a managed machine cannot do without, and disks that are not there.
fn check_launch(launch: &str, disks: &[&DiskName]) -> Result<(), Failure> {
    let known = disks.iter().map(|disk| ((*disk).clone(), PathBuf::from("/disk"))).collect();
    let (qmp, pid_file) = (Path::new("/qmp"), Path::new("/pid"));
    command_line(launch, Values { disks: &known, qmp, pid_file, incoming: Incoming::No })?;
    if let Some(found) = keeps_nothing(launch, disks) {
        return Err(Failure::new(
            Code::Invalid,
            format!("the launch command has {found}: what the guest writes would not be kept"),
        )
        .refused()
        .hint("take it out of the command"));
    }
    let mut missing = String::new();
    let wanted = disks.iter().map(|disk| disk.as_str()).chain(["qmp", "pidfile"]);
    for name in wanted.filter(|name| !launch.contains(&format!("{{{name}}}"))) {
        let _ = write!(missing, " {{{name}}}");
    }
    if missing.is_empty() {
        return Ok(());
    }
    Err(Failure::new(Code::Invalid, format!("the launch command lacks{missing}"))
        .refused()
        .hint("for instance: -blockdev driver={vda.format},node-name=vda,file.driver=file,file.filename={vda} -qmp unix:{qmp},server=on,wait=off -pidfile {pidfile}"))
}

/// What of a launch command keeps the guest's writes from the machine's disks, as far as it can be seen in it.
fn keeps_nothing(launch: &str, disks: &[&DiskName]) -> Option<String> {
    let of_disk = |word: &str| disks.iter().any(|disk| word.contains(&format!("{{{disk}}}")));
    shell_words::split(launch).unwrap_or_default().into_iter().find_map(|word| {
        if ["-snapshot", "--snapshot"].contains(&word.as_str()) {
            return Some("-snapshot".to_owned());
        }
        let mut options = word.split(',').filter(|_| of_disk(&word));
        let found = options.find(|option| {
            let bare: String =
                option.chars().filter(|c| !c.is_whitespace() && !"{}\"".contains(*c)).collect();
            let (key, value) = bare.split_once(['=', ':']).unwrap_or((bare.as_str(), "on"));
            ["snapshot", "readonly", "read-only"].contains(&key)
                && ["on", "yes", "true", "y"].contains(&value)
        });
        found.map(|option| option.trim().to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disks() -> BTreeMap<DiskName, PathBuf> {
        BTreeMap::from([(DiskName::new("vda").unwrap(), PathBuf::from("/vm/a b.qcow2"))])
    }

    fn line(launch: &str) -> Result<Vec<String>, Failure> {
        let disks = disks();
        line_with(launch, &disks, Incoming::No)
    }

    fn line_with(
        launch: &str,
        disks: &BTreeMap<DiskName, PathBuf>,
        incoming: Incoming,
    ) -> Result<Vec<String>, Failure> {
        command_line(launch, Values { disks, qmp: Path::new("/q"), pid_file: Path::new("/p"), incoming })
    }

    #[test]
    fn a_machine_that_waits_for_its_memory_is_told_so_where_the_command_says_or_at_its_end() {
        let words = |launch| line_with(launch, &disks(), Incoming::Defer).unwrap();
        assert_eq!(words("q {incoming} -x"), ["q", "-incoming", "defer", "-x"]);
        assert_eq!(words("q -x"), ["q", "-x", "-incoming", "defer"]);
        assert_eq!(words("q {incoming} {incoming}"), ["q", "-incoming", "defer"]);
    }

    #[test]
    fn a_launch_command_is_split_and_filled_without_a_shell() {
        let words = line(
            "qemu '-drive' file={vda},format={vda.format} -qmp unix:{qmp} -pidfile {pidfile} {incoming} '$HOME'",
        );
        let expected = [
            "qemu",
            "-drive",
            "file=/vm/a b.qcow2,format=qcow2",
            "-qmp",
            "unix:/q",
            "-pidfile",
            "/p",
            "$HOME",
        ];
        assert_eq!(words.unwrap(), expected);
    }

    #[test]
    fn braces_that_are_no_placeholder_stay() {
        let words = line(r#"q '{"driver":"file","filename":"{vda}"}' {vdb} {"#);
        assert_eq!(words.unwrap(), ["q", r#"{"driver":"file","filename":"/vm/a b.qcow2"}"#, "{vdb}", "{"]);
    }

    #[test]
    fn a_path_is_written_as_the_option_that_it_stands_in_reads_it() {
        let disks = BTreeMap::from([(DiskName::new("vda").unwrap(), PathBuf::from("/vm/a,\"b"))]);
        let words = |launch| line_with(launch, &disks, Incoming::No).unwrap();
        assert_eq!(words("q -drive file={vda},if=virtio"), ["q", "-drive", "file=/vm/a,,\"b,if=virtio"]);
        assert_eq!(words("q -hda {vda}"), ["q", "-hda", "/vm/a,\"b"]);
        assert_eq!(words(r#"q '{"filename":"{vda}"}'"#), ["q", r#"{"filename":"/vm/a,\"b"}"#]);
        let broken = BTreeMap::from([(DiskName::new("vda").unwrap(), PathBuf::from("/vm/a\nb"))]);
        assert!(line_with("q {vda}", &broken, Incoming::No).is_err());
        assert!(line("q 'open").is_err());
        assert!(line("{incoming}").is_err());
    }

    #[test]
    fn what_keeps_nothing_of_the_guests_writes_is_seen() {
        let vda = DiskName::new("vda").unwrap();
        let found = |launch| keeps_nothing(launch, &[&vda]);
        assert_eq!(found("q -snapshot -hda {vda}").as_deref(), Some("-snapshot"));
        assert_eq!(found("q -drive file={vda},snapshot=on").as_deref(), Some("snapshot=on"));
        assert_eq!(found("q -drive file={vda},readonly").as_deref(), Some("readonly"));
        assert!(found(r#"q '{"filename":"{vda}", "read-only": true}'"#).is_some());
        assert_eq!(found("q -drive file=other.iso,readonly=on -drive file={vda},readonly=off"), None);
    }

    #[test]
    fn a_launch_command_names_disks_socket_and_pid_file() {
        let vda = DiskName::new("vda").unwrap();
        let wish = |launch: &str| RunsWish { launch: Some(launch.to_owned()), ..RunsWish::default() };
        let of = |wish: &RunsWish| Runs::of(wish, &[&vda], Path::new("/run/x"));
        let refused = of(&wish("qemu {qmp}")).unwrap_err();
        assert_eq!(refused.message, "the launch command lacks {vda} {pidfile}");
        let managed = of(&wish("qemu {vda} {qmp} {pidfile}")).unwrap();
        assert_eq!(managed.qmp(), Some(Path::new("/run/x.qmp")));
        assert!(of(&RunsWish { start: Some("a".into()), ..RunsWish::default() }).is_err());
        let both = RunsWish { qmp: Some("/q".into()), ..wish("qemu {vda} {qmp} {pidfile}") };
        assert!(of(&both).is_err());
        assert_eq!(of(&RunsWish::default()).unwrap(), Runs::Apart);
    }
}

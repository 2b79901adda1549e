//! Values on the command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{OsStringValueParser, TypedValueParser};
use jiff::SignedDuration;
use snaptree_engine::tree::Labels;
use snaptree_engine::{DiskName, LabelKey};

/// A label as it is written: `K=V`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    /// The key.
    pub key: LabelKey,
    /// The value; empty to take the label away, where that is possible.
    pub value: String,
}

/// Reads a path, or an empty value that says that there is none.
pub fn path_or_none() -> impl TypedValueParser<Value = PathBuf> {
    OsStringValueParser::new().map(PathBuf::from)
}

/// Reads `K=V`.
///
/// # Errors
/// There is no `=`, or the key is no key.
pub fn label(text: &str) -> Result<Label, String> {
    let (key, value) = text.split_once('=').ok_or("a label is written KEY=VALUE")?;
    let key = LabelKey::new(key).map_err(|error| error.to_string())?;
    Ok(Label { key, value: value.to_owned() })
}

/// Reads `K=V` where there is nothing to take away.
///
/// # Errors
/// As [`label`], or the value is empty.
pub fn new_label(text: &str) -> Result<Label, String> {
    match label(text)? {
        label if label.value.is_empty() => Err("a label needs a value".to_owned()),
        label => Ok(label),
    }
}

/// The labels of a command; of two with one key, the last counts.
pub fn labels(given: &[Label]) -> Labels {
    given.iter().map(|label| (label.key.clone(), label.value.clone())).collect()
}

/// A disk as it is written: `vda=FILE`; for the simulated hypervisor the name alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskArg {
    /// Its target name.
    pub name: DiskName,
    /// Its image; empty where there is none.
    pub path: PathBuf,
}

/// Reads `NAME=FILE` or `NAME`.
///
/// # Errors
/// The name is none.
pub fn disk(text: &str) -> Result<DiskArg, String> {
    let (name, path) = text.split_once('=').unwrap_or((text, ""));
    let name = DiskName::new(name).map_err(|error| format!("{error}; a disk is written vda=FILE"))?;
    Ok(DiskArg { name, path: PathBuf::from(path) })
}

/// Reads a duration: seconds, or `500ms`, `2m`, `1h30m`.
///
/// # Errors
/// It is neither, or negative.
pub fn duration(text: &str) -> Result<Duration, String> {
    let parsed = match text.trim().parse::<u64>() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        Err(_) => text.parse::<SignedDuration>().ok().and_then(|given| Duration::try_from(given).ok()),
    };
    parsed.ok_or_else(|| "a duration is written 30s, 500ms, 2m or 1h30m".to_owned())
}

/// Reads a size: bytes, or with a unit: `512 MiB`, `4G`, `10 GB`.
///
/// # Errors
/// It is neither, or too large.
pub fn bytes(text: &str) -> Result<u64, String> {
    let problem = || format!("'{text}' is no size: write 512 MiB, 4 GiB or a number of bytes");
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| problem())?;
    let factor: u64 = match unit.trim() {
        "" | "B" => 1,
        "K" | "KiB" => 1 << 10,
        "M" | "MiB" => 1 << 20,
        "G" | "GiB" => 1 << 30,
        "T" | "TiB" => 1 << 40,
        "kB" | "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        _ => return Err(problem()),
    };
    number.checked_mul(factor).ok_or_else(problem)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_have_a_key_and_a_value() {
        assert_eq!(label("tier=prod=1").unwrap().value, "prod=1");
        assert_eq!(label("tier=").unwrap().value, "");
        for bad in ["tier", "=x", "a b=x"] {
            assert!(label(bad).is_err(), "{bad}");
        }
        assert!(new_label("tier=").is_err());
    }

    #[test]
    fn disks_have_a_name_and_perhaps_a_file() {
        assert_eq!(disk("vda=/x/a=b.qcow2").unwrap().path, PathBuf::from("/x/a=b.qcow2"));
        assert_eq!(disk("vda").unwrap().path, PathBuf::new());
        assert!(disk("=x").is_err());
        assert!(disk("/x/y.qcow2").is_err());
    }

    #[test]
    fn durations_and_sizes() {
        for (text, millis) in [("5", 5_000), ("500ms", 500), ("2m", 120_000), ("1h30m", 5_400_000), ("0", 0)]
        {
            assert_eq!(duration(text).unwrap(), Duration::from_millis(millis), "{text}");
        }
        for bad in ["", "-5s", "soon", "5 parsecs"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
        for (text, size) in [("0", 0), ("4 GiB", 4 << 30), ("4G", 4 << 30), ("10 MB", 10_000_000), ("7B", 7)]
        {
            assert_eq!(bytes(text).unwrap(), size, "{text}");
        }
        for bad in ["", "GiB", "-1", "4 gigs", "99999999999 TiB", "1.5G"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }
}

//! Policy files.
//!
//! ```toml
//! name = "hourly"                    # letters, digits, '-', '_', '.'
//! domains = ["web-*", "db[0-9]"]     # globs on names, any of them: * ? [a-z] {a,b}
//! labels = { tier = "prod" }         # all of them; domains or labels may be left out, not both
//! schedule = "hourly"                # OnCalendar, cron, or "every 15m"
//! timezone = "Europe/Vienna"         # of the schedule and of [keep]; UTC if left out
//! jitter = "5m"                      # each domain runs by up to so much later, always by the same
//! catch-up = "once"                  # or "none": what becomes of runs that were missed
//! window = "12h"                     # a missed run older than this is skipped; any age if left out
//! max-depth = 64                     # snapshots that a machine's disk may stand upon
//! suspend-after = 5                  # failures in a row after which the policy is suspended
//! deletes-per-run = 20               # most deletes that one run asks for; no limit if left out
//!
//! [snapshot]
//! name = "{policy}-{time}"           # {policy}, {domain}, {time}: UTC, 20261123T021500Z; {time} must be there
//! description = "by the hour"
//! memory = false                     # with the machine's memory
//! quiesce = false                    # ask the guest to bring its file systems to rest first; not with memory
//! labels = { made-by = "hourly" }
//!
//! [keep]                             # left out: nothing is ever deleted
//! last = 3                           # a number, or "all"
//! hourly = 24                        # also daily, weekly, monthly, quarterly, yearly
//! within = "36h"                     # all that were taken so long before the newest
//! within-daily = "30d"               # one a day of those; also -hourly, -weekly, -monthly, -quarterly, -yearly
//! max-age = "1y"                     # older ones go whatever the rules say
//! min-keep = 1                       # but so many of the newest always stay
//!
//! [hooks.before]                     # also [hooks.after]
//! program = ["/usr/local/bin/freeze", "--all"]
//! timeout = "30s"
//! environment = { MODE = "snapshot" }
//! on-failure = "abort"               # or "go-on"; after is always "go-on"
//!
//! [notify]
//! webhook = "https://example.com/hook"
//! command = ["/usr/local/bin/page"]
//! timeout = "10s"
//! on = ["failure", "recovery", "needs-attention"]
//! ```
//!
//! Only `name`, `schedule`, and one of `domains` and `labels` have to be there. An unknown key, a wrong type or a value
//! that is out of bounds is refused with its line and column and what is allowed. A policy goes into the log as it is:
//! it is no place for a password.

mod policy;
mod read;
mod values;

pub use policy::{
    CommandLine, DEPTH_MAX_DEFAULT, Hook, Hooks, Notify, Occasion, Policy, SUSPEND_AFTER_DEFAULT, Selection,
    SnapshotSpec,
};
pub use read::{FILE_BYTES_MAX, FileError, Problem};
pub use values::{DomainGlob, NameTemplate, TimeZoneName, ValueError, Webhook};

#[cfg(test)]
mod tests;

//! What has one owner: names, images, layers folders, machines.
//!
//! Whether something is free is judged by the store, inside the append that takes it ([`Claims::check`]): whoever looked
//! before the append may have looked at the same time as somebody else. What is claimed follows from the events alone, so
//! a store needs to keep nothing that could contradict them.
//!
//! Names of policies and of hosts need no claim: a policy's name is its stream, and hosts are all on one stream, whose
//! version is compared.
//!
//! In a log that is older than claims two domains may have the same; the first of them keeps it.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::domain::Disk;
use crate::event::Event;
use crate::ids::{DomainId, DomainName, StreamId};

/// What kind of thing it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClaimKind {
    /// The name of a domain.
    Name,
    /// An image, by the path that it was registered by or leads to.
    Image,
    /// An image, by what the file is, by whatever path it is reached: see the driver.
    File,
    /// A layers folder, by its path.
    Layers,
    /// A machine of a hypervisor that keeps a list, as that knows it.
    Machine,
}

/// Something that one domain has.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Claim {
    /// What it is.
    pub kind: ClaimKind,
    /// Which one.
    pub value: String,
}

impl Claim {
    /// A claim on that.
    pub fn new(kind: ClaimKind, value: impl Into<String>) -> Self {
        Self { kind, value: value.into() }
    }

    fn name(name: &DomainName) -> Self {
        Self::new(ClaimKind::Name, name.as_str())
    }
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            ClaimKind::Name => write!(f, "the name '{}'", self.value),
            ClaimKind::Image => write!(f, "image {}", self.value),
            // Its value is for machines.
            ClaimKind::File => f.write_str("one of its images"),
            ClaimKind::Layers => write!(f, "the layers folder {}", self.value),
            ClaimKind::Machine => f.write_str("this machine"),
        }
    }
}

/// Somebody else has what an event would take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claimed {
    /// What.
    pub claim: Claim,
    /// Who has it.
    pub owner: DomainId,
}

/// Who has what, as the events so far tell.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Claims(BTreeMap<Claim, DomainId>);

impl Claims {
    /// Whether an event of that kind can take or give back anything, so that these have to be known.
    pub const fn concern(event: &Event) -> bool {
        matches!(event, Event::DomainRegistered(_) | Event::DomainChanged(_) | Event::DomainUnregistered(_))
    }

    /// Whether nobody else has what the event takes.
    ///
    /// # Errors
    /// Somebody has.
    pub fn check(&self, stream: &StreamId, event: &Event) -> Result<(), Claimed> {
        let StreamId::Domain(domain) = stream else { return Ok(()) };
        for claim in taken(event) {
            if let Some(owner) = self.0.get(&claim).filter(|owner| *owner != domain) {
                return Err(Claimed { claim, owner: *owner });
            }
        }
        Ok(())
    }

    /// Follows an event of the log. What somebody has already stays theirs.
    pub fn apply(&mut self, stream: &StreamId, event: &Event) {
        let StreamId::Domain(domain) = *stream else { return };
        match event {
            Event::DomainUnregistered(_) => self.0.retain(|_, owner| *owner != domain),
            Event::DomainChanged(changed) => {
                self.0.retain(|claim, owner| {
                    let given_back = match claim.kind {
                        ClaimKind::Name => changed.name.is_some(),
                        ClaimKind::Image | ClaimKind::File => {
                            changed.disks.is_some() || changed.claims.is_some()
                        }
                        ClaimKind::Layers | ClaimKind::Machine => changed.claims.is_some(),
                    };
                    *owner != domain || !given_back
                });
            }
            _ => {}
        }
        for claim in taken(event) {
            self.0.entry(claim).or_insert(domain);
        }
    }
}

/// The images of disks, by the paths that they were registered by.
fn images(disks: &[Disk]) -> impl Iterator<Item = Claim> {
    let paths = disks.iter().filter_map(|disk| disk.path.as_ref());
    paths.map(|path| Claim::new(ClaimKind::Image, path.to_string_lossy()))
}

/// What an event takes.
fn taken(event: &Event) -> Vec<Claim> {
    match event {
        Event::DomainRegistered(registered) => {
            let domain = &registered.domain;
            let mut taken: Vec<Claim> =
                images(&domain.disks).chain(registered.claims.iter().cloned()).collect();
            taken.push(Claim::name(&domain.name));
            taken
        }
        Event::DomainChanged(changed) => {
            let name = changed.name.as_ref().map(Claim::name);
            let images = changed.disks.iter().flat_map(|disks| images(disks));
            changed.claims.iter().flatten().cloned().chain(images).chain(name).collect()
        }
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test")]

    use super::*;
    use crate::event::{DomainChanged, DomainUnregistered, UnregisterWish};
    use crate::ids::{IdSource, UuidV7};

    fn domain() -> (DomainId, StreamId) {
        let id = DomainId::from_uuid(UuidV7.next());
        (id, StreamId::Domain(id))
    }

    fn named(name: &str) -> Event {
        DomainChanged { name: Some(DomainName::new(name).unwrap()), ..DomainChanged::default() }.into()
    }

    fn having(images: &[&str]) -> Event {
        let claims = images.iter().map(|image| Claim::new(ClaimKind::Image, *image)).collect();
        DomainChanged { claims: Some(claims), ..DomainChanged::default() }.into()
    }

    #[test]
    fn what_somebody_has_is_refused_until_it_is_given_back() {
        let ((a, of_a), (_, of_b)) = (domain(), domain());
        let mut claims = Claims::default();
        for event in [named("web"), having(&["/a", "/b"])] {
            claims.apply(&of_a, &event);
        }
        // One's own is free for oneself.
        assert_eq!(claims.check(&of_a, &named("web")), Ok(()));
        let claimed = claims.check(&of_b, &having(&["/c", "/b"])).unwrap_err();
        assert_eq!(claimed, Claimed { claim: Claim::new(ClaimKind::Image, "/b"), owner: a });
        assert!(claims.check(&of_b, &named("web")).is_err());
        // A rename gives back the name alone, other disks the images alone.
        claims.apply(&of_a, &named("db"));
        assert_eq!(claims.check(&of_b, &named("web")), Ok(()));
        assert!(claims.check(&of_b, &having(&["/b"])).is_err());
        claims.apply(&of_a, &having(&["/a"]));
        assert_eq!(claims.check(&of_b, &having(&["/b"])), Ok(()));
        assert!(claims.check(&of_b, &named("db")).is_err());
        let gone = DomainUnregistered { wish: UnregisterWish::Untouched, left: Vec::new() }.into();
        claims.apply(&of_a, &gone);
        assert_eq!(claims, Claims::default());
    }

    #[test]
    fn in_a_log_with_duplicates_the_first_owner_keeps_it() {
        let ((a, of_a), (_, of_b)) = (domain(), domain());
        let mut claims = Claims::default();
        claims.apply(&of_a, &named("web"));
        claims.apply(&of_b, &named("web"));
        let (_, of_c) = domain();
        assert_eq!(claims.check(&of_c, &named("web")).unwrap_err().owner, a);
        // The second gives back what it never had, and takes nothing of the first's with it.
        claims.apply(&of_b, &named("db"));
        assert_eq!(claims.check(&of_c, &named("web")).unwrap_err().owner, a);
    }
}

mod hostile;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use crate::domain::{Capabilities, Domain, DriverKind};
use crate::event::{Actor, MemoryKind, Place};
use crate::ids::{DomainName, OperationId, SnapshotId};
use crate::tree::{Snapshot, SnapshotState};

fn disk_name(name: &str) -> DiskName {
    DiskName::new(name).unwrap()
}

fn domain_disks(names: &[&str]) -> Vec<Disk> {
    let path = |name: &str| Some(PathBuf::from(format!("/images/{name}.qcow2")));
    let disk = |name: &&str| Disk::new(disk_name(name), path(name), 1 << 30);
    names.iter().map(disk).collect()
}

fn domain(disks: &[&str]) -> Domain {
    Domain {
        id: DomainId::from_uuid(Uuid::from_u128(0x6695_eb01_f6a4_8304_79aa_97f2_502e_193f)),
        name: DomainName::new("test").unwrap(),
        driver: DriverKind::Qemu,
        disks: domain_disks(disks),
        config: serde_json::Value::Null,
        labels: Labels::new(),
        capabilities: Capabilities {
            memory: true,
            memory_external: false,
            disk_only: true,
            quiesce: false,
            internal: false,
            disk_selection: true,
            children_only: true,
            metadata_only: true,
            merges_itself: false,
            keeps_names: false,
            name_bytes_max: 255,
            depth_max: 64,
        },
    }
}

fn snapshot(name: &str, disks: &[&str]) -> Snapshot {
    Snapshot {
        id: SnapshotId::from_uuid(Uuid::from_u128(1)),
        name: SnapshotName::new(name).unwrap(),
        description: None,
        parent: None,
        created: Timestamp::from_second(1_795_401_658).unwrap(),
        state: SnapshotState::Running,
        memory: MemoryKind::No,
        disks: disks.iter().map(|name| disk_name(name)).collect(),
        labels: Labels::new(),
        hold: None,
        made_by: Actor::Engine,
        made_in: Some(OperationId::from_uuid(Uuid::from_u128(2))),
        lost: false,
        real_name: None,
        native: None,
        left_out: Vec::new(),
    }
}

fn refusal(text: &str) -> String {
    read(text).map_or_else(|error| error.to_string(), |found| format!("accepted: {found:?}"))
}

fn in_root(inner: &str) -> String {
    format!("<domainsnapshot>{inner}</domainsnapshot>")
}

fn name_of(inner: &str) -> Option<String> {
    read(&in_root(inner)).unwrap().name.map(String::from)
}

#[test]
fn nothing_is_needed() {
    for text in [
        "<domainsnapshot/>",
        "<domainsnapshot></domainsnapshot>",
        "\u{feff}<?xml version='1.0'?>\n<domainsnapshot/>\n",
    ] {
        assert_eq!(read(text).unwrap(), SnapshotXml::default(), "{text}");
    }
    // Empty texts are none, as in libvirt.
    let empty =
        in_root("<name/><description></description><state/><creationTime/><memory/><parent/><disks/>");
    assert_eq!(read(&empty).unwrap(), SnapshotXml::default());
}

#[test]
fn texts_are_what_xpath_makes_of_them() {
    for (inner, name) in [
        ("<name>a</name>", Some("a")),
        ("<name>a</name><name>b</name>", Some("a")),
        ("<name/><name>b</name>", None),
        ("<name>a<b>c</b><!-- x --><?y z?>d<![CDATA[<e>]]></name>", Some("acd<e>")),
        ("<name>a&lt;&#98;&#x63;&amp;&quot;&apos;&gt;</name>", Some("a<bc&\"'>")),
        ("<name> a </name>", Some(" a ")),
        ("<x:name xmlns:x='urn:x'>a</x:name>", None),
        ("<x:name>a</x:name>", None),
        ("<name xmlns='urn:x'>a</name><name>b</name>", Some("b")),
        ("<metadata><name>a</name></metadata>", None),
        ("<inactiveDomain><name>a</name></inactiveDomain><cookie><name>c</name></cookie>", None),
        ("<Name>a</Name>", None),
    ] {
        assert_eq!(name_of(inner).as_deref(), name, "{inner}");
    }
    let text = in_root("<description> x  y\r\nz&#13;q\t</description>");
    assert_eq!(read(&text).unwrap().description.as_deref(), Some(" x  y\nz\rq\t"));
}

#[test]
fn all_parameters() {
    let text = "<!-- of virsh -->
<domainsnapshot>
  <name>my snap</name>
  <description>!@#$%^</description>
  <state>running</state>
  <parent>
    <name>earlier</name>
  </parent>
  <creationTime>1272917631</creationTime>
  <memory snapshot='external' file='/var/mem&apos;1'/>
  <disks>
    <disk name='/dev/HostVG/QEMUGuest1'/>
    <disk name='hda' snapshot='no'/>
    <disk name='hdb' snapshot='internal'/>
    <disk name='hdc' snapshot='external'>
      <driver type='qed'><metadata_cache><max_size unit='bytes'>1</max_size></metadata_cache></driver>
    </disk>
    <disk name='hdd' type='file'>
      <source file='/path/to/new'><seclabel model='dac' relabel='no'/></source>
      <driver/>
    </disk>
    <disk name='hde' type='block'><source dev='/dev/new'/></disk>
    <disk name='hdf' type='network'>
      <source protocol='rbd' name='pool/image'><host name='h' port='7000'/></source>
    </disk>
    <disk name='hdg' snapshot='manual'/>
  </disks>
  <revertDisks><disk name='hdh' snapshot='external'/></revertDisks>
  <domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
    <name>QEMUGuest1</name>
    <uuid>c7a5fdbd-edaf-9455-926a-d65c16db1809</uuid>
    <description>not ours</description>
    <devices><disk name='x' snapshot='bogus'/></devices>
    <qemu:commandline><qemu:arg value='-x'/></qemu:commandline>
  </domain>
  <active>1</active>
</domainsnapshot>
";
    insta::assert_debug_snapshot!(read(text).unwrap(), @r#"
    SnapshotXml {
        name: Some(
            SnapshotName("my snap"),
        ),
        description: Some(
            "!@#$%^",
        ),
        creation_time: Some(
            2010-05-03T20:13:51Z,
        ),
        state: Some(
            Running,
        ),
        parent: Some(
            "earlier",
        ),
        domain_uuid: Some(
            DomainId(c7a5fdbd-edaf-9455-926a-d65c16db1809),
        ),
        memory: Some(
            External {
                file: Some(
                    "/var/mem'1",
                ),
            },
        ),
        disks: [
            DiskXml {
                name: "/dev/HostVG/QEMUGuest1",
                snapshot: None,
                kind: File,
                source: None,
                driver: None,
            },
            DiskXml {
                name: "hda",
                snapshot: Some(
                    No,
                ),
                kind: File,
                source: None,
                driver: None,
            },
            DiskXml {
                name: "hdb",
                snapshot: Some(
                    Internal,
                ),
                kind: File,
                source: None,
                driver: None,
            },
            DiskXml {
                name: "hdc",
                snapshot: Some(
                    External,
                ),
                kind: File,
                source: None,
                driver: Some(
                    "qed",
                ),
            },
            DiskXml {
                name: "hdd",
                snapshot: Some(
                    External,
                ),
                kind: File,
                source: Some(
                    "/path/to/new",
                ),
                driver: None,
            },
            DiskXml {
                name: "hde",
                snapshot: Some(
                    External,
                ),
                kind: Block,
                source: Some(
                    "/dev/new",
                ),
                driver: None,
            },
            DiskXml {
                name: "hdf",
                snapshot: Some(
                    External,
                ),
                kind: Network,
                source: Some(
                    "pool/image",
                ),
                driver: None,
            },
            DiskXml {
                name: "hdg",
                snapshot: Some(
                    Manual,
                ),
                kind: File,
                source: None,
                driver: None,
            },
        ],
    }
    "#);
}

#[test]
fn the_time_has_an_older_name() {
    let time = |inner: &str| read(&in_root(inner)).unwrap().creation_time.map(Timestamp::as_second);
    assert_eq!(time("<creationdate>12</creationdate>"), Some(12));
    assert_eq!(time("<creationdate>12</creationdate><creationTime> 13</creationTime>"), Some(13));
    assert_eq!(time("<creationTime>-1</creationTime>"), Some(-1));
    for bad in ["x", "12 ", "99999999999999999", "9223372036854775808", "1e3", "\u{9b}1"] {
        let refused = refusal(&in_root(&format!("<creationTime>{bad}</creationTime>")));
        assert!(refused.starts_with("Invalid creationTime"), "{bad}: {refused}");
    }
}

#[test]
fn memory() {
    let memory = |inner: &str| read(&in_root(inner)).unwrap().memory;
    assert_eq!(memory("<memory snapshot='no'/>"), Some(MemoryXml::No));
    assert_eq!(memory("<memory snapshot='internal'/><memory snapshot='no'/>"), Some(MemoryXml::Internal));
    assert_eq!(memory("<memory snapshot='external'/>"), Some(MemoryXml::External { file: None }));
    assert_eq!(memory("<memory file='/m'/>"), Some(MemoryXml::External { file: Some("/m".into()) }));
}

#[test]
fn values_are_refused_in_libvirts_words() {
    for (inner, words) in [
        ("<state>nostate</state>", "Invalid state 'nostate' in domain snapshot XML"),
        ("<state> running</state>", "Invalid state ' running' in domain snapshot XML"),
        ("<memory snapshot='manual'/>", "'manual' memory snapshot mode not supported"),
        ("<memory snapshot='bogus'/>", "Invalid value for attribute 'snapshot' in element 'memory': 'bogus'"),
        ("<memory snapshot='no' file='/x'/>", "memory filename '/x' requires external snapshot"),
        ("<memory file='x'/>", "memory snapshot file path (x) must be absolute"),
        ("<disks><disk/></disks>", "missing name from disk snapshot element"),
        (
            "<disks><disk name='vda' snapshot='bogus'/></disks>",
            "Invalid value for attribute 'snapshot' in element 'disk': 'bogus'",
        ),
        (
            "<disks><disk name='vda' snapshot='default'/></disks>",
            "Invalid value for attribute 'snapshot' in element 'disk': 'default'",
        ),
        ("<disks><disk name='vda' type='volume'/></disks>", "unsupported disk snapshot type 'volume'"),
        ("<disks><disk name='vda'><driver type='x'/></disk></disks>", "unknown disk snapshot driver 'x'"),
        (
            "<disks><disk name='vda'><source file='rel'/></disk></disks>",
            "disk snapshot image path 'rel' must be absolute",
        ),
        ("<domain><uuid>zz</uuid></domain>", "malformed uuid element 'zz'"),
        ("<name>a/b</name>", "invalid snapshot name 'a/b': name can't contain '/'"),
        ("<name>.a</name>", "invalid snapshot name '.a': name can't start with '.'"),
    ] {
        assert_eq!(refusal(&in_root(inner)), words, "{inner}");
    }
    let error = read(&in_root("<name>a/b</name>")).unwrap_err();
    let source = std::error::Error::source(&error).unwrap();
    assert!(source.downcast_ref::<NameError>().is_some());
}

#[test]
fn a_document_with_internal_disks_asks_for_a_snapshot_inside_the_images() {
    let asked = |inner: &str| read(&in_root(inner)).unwrap().to_create(&domain_disks(&["vda", "vdb"]));
    let inside = "<memory snapshot='internal'/><disks><disk name='vda' snapshot='internal'/></disks>";
    let create = asked(inside).unwrap();
    assert_eq!((create.place, create.content, create.disks), (Place::Internal, Content::WithMemory, None));
    assert_eq!(asked("<memory snapshot='internal'/>").unwrap().place, Place::Usual);
    let mixed = "<memory snapshot='external'/><disks><disk name='vda' snapshot='internal'/></disks>";
    assert!(asked(mixed).is_err());
}

#[test]
fn a_create_is_made() {
    let create = |inner: &str, disks: &[&str]| read(&in_root(inner)).unwrap().to_create(&domain_disks(disks));
    let only = |names: &[&str]| Some(names.iter().map(|name| disk_name(name)).collect::<BTreeSet<_>>());

    assert_eq!(create("", &["vda"]).unwrap(), Create::default());
    let made = create(
        "<name>a</name><description>d</description><state>crashed</state><creationTime>1</creationTime>
         <parent><name>p</name></parent><memory snapshot='no'/>
         <disks><disk name='/images/vdb.qcow2' snapshot='no'/><disk name='vdc' snapshot='external'/></disks>",
        &["vda", "vdb", "vdc"],
    );
    let expected = Create {
        name: Some(SnapshotName::new("a").unwrap()),
        description: Some("d".into()),
        labels: Labels::new(),
        content: Content::DisksOnly,
        place: Place::Usual,
        disks: only(&["vda", "vdc"]),
        quiesce: false,
    };
    assert_eq!(made.unwrap(), expected);
    for (memory, content) in [("internal", Content::WithMemory), ("external", Content::WithMemory)] {
        assert_eq!(create(&format!("<memory snapshot='{memory}'/>"), &["vda"]).unwrap().content, content);
    }
    let all = "<disks><disk name='vda'><driver type='qcow2'/></disk></disks>";
    assert_eq!(create(all, &["vda", "vdb"]).unwrap().disks, None);
    assert_eq!(create("", &[]).unwrap().disks, None);
}

#[test]
fn a_create_is_refused() {
    let cases = [
        "<disk name='vda'/><disk name='vda'/><disk name='vda'/>",
        "<disk name='vdc'/>",
        "<disk name=''/>",
        "<disk name='vda'/><disk name='/images/vda.qcow2'/>",
        "<disk name='vda' snapshot='no'/><disk name='vdb' snapshot='no'/>",
        "<disk name='vda' snapshot='no'><source file='/x'/></disk>",
        "<disk name='vda' snapshot='internal'/><disk name='vdb' snapshot='external'/>",
        "<disk name='vda' snapshot='manual'/>",
        "<disk name='vda'><source file='/x'/></disk>",
        "<disk name='vda' snapshot='external' type='block'/>",
        "<disk name='vda'><driver type='qed'/></disk>",
        "</disks><memory file='/m'/><disks>",
    ];
    let refused = |inner: &&str| {
        let found = read(&in_root(&format!("<disks>{inner}</disks>"))).unwrap();
        format!("{inner}\n    {}", found.to_create(&domain_disks(&["vda", "vdb"])).unwrap_err())
    };
    insta::assert_snapshot!(cases.iter().map(refused).collect::<Vec<_>>().join("\n"), @r#"
    <disk name='vda'/><disk name='vda'/><disk name='vda'/>
        too many disk snapshot requests for domain
    <disk name='vdc'/>
        no disk named 'vdc'
    <disk name=''/>
        no disk named ''
    <disk name='vda'/><disk name='/images/vda.qcow2'/>
        disk 'vda' specified twice
    <disk name='vda' snapshot='no'/><disk name='vdb' snapshot='no'/>
        nothing selected for snapshot
    <disk name='vda' snapshot='no'><source file='/x'/></disk>
        file '/x' for disk 'vda' requires use of external snapshot mode
    <disk name='vda' snapshot='internal'/><disk name='vdb' snapshot='external'/>
        unsupported configuration: mixing internal and external targets for a snapshot is not yet supported
    <disk name='vda' snapshot='manual'/>
        unsupported configuration: snapshot mode 'manual' for disk 'vda' is not offered
    <disk name='vda'><source file='/x'/></disk>
        unsupported configuration: file '/x' for disk 'vda' cannot be chosen: leave out <source>, and Snaptree names the file
    <disk name='vda' snapshot='external' type='block'/>
        unsupported configuration: disk 'vda': only snapshots into files are offered
    <disk name='vda'><driver type='qed'/></disk>
        unsupported configuration: format 'qed' for disk 'vda': only qcow2 is offered for the new image
    </disks><memory file='/m'/><disks>
        unsupported configuration: memory file '/m' cannot be chosen: leave out the file attribute, and Snaptree names the file
    "#);
}

#[test]
fn written_as_virsh_prints_it() {
    let parent = snapshot("earlier", &[]);
    let mut shot = snapshot("a<b", &["vda", "vdb", "old"]);
    shot.description = Some("it's \"<&>\"\r\n\ttab, \u{1b}[0m".into());
    shot.memory = MemoryKind::External;
    let files = BTreeMap::from([(disk_name("vda"), PathBuf::from("/images/it's.qcow2"))]);
    insta::assert_snapshot!(write(&shot, Some(&parent), &domain(&["vda", "vdb", "vdc"]), &files, Some(Path::new("/vm/m's"))), @r#"
    <domainsnapshot>
      <name>a&lt;b</name>
      <description>it&apos;s &quot;&lt;&amp;&gt;&quot;&#xD;
    	tab, �[0m</description>
      <state>running</state>
      <parent>
        <name>earlier</name>
      </parent>
      <creationTime>1795401658</creationTime>
      <memory snapshot='external' file='/vm/m&apos;s'/>
      <disks>
        <disk name='vda' snapshot='external' type='file'>
          <driver type='qcow2'/>
          <source file='/images/it&apos;s.qcow2'/>
        </disk>
        <disk name='vdb' snapshot='external'/>
        <disk name='vdc' snapshot='no'/>
        <disk name='old' snapshot='external'/>
      </disks>
      <domain>
        <uuid>6695eb01-f6a4-8304-79aa-97f2502e193f</uuid>
      </domain>
    </domainsnapshot>
    "#);

    shot.memory = MemoryKind::Internal;
    shot.description = None;
    shot.state = SnapshotState::DiskSnapshot;
    insta::assert_snapshot!(write(&shot, None, &domain(&["vda"]), &files, None), @r#"
    <domainsnapshot>
      <name>a&lt;b</name>
      <state>disk-snapshot</state>
      <creationTime>1795401658</creationTime>
      <memory snapshot='internal'/>
      <disks>
        <disk name='vda' snapshot='internal'/>
        <disk name='old' snapshot='internal'/>
        <disk name='vdb' snapshot='internal'/>
      </disks>
      <domain>
        <uuid>6695eb01-f6a4-8304-79aa-97f2502e193f</uuid>
      </domain>
    </domainsnapshot>
    "#);
    let bare = write(&snapshot("bare", &[]), None, &domain(&[]), &BTreeMap::new(), None);
    assert!(!bare.contains("disks"), "{bare}");
}

#[test]
fn states_and_memory_read_back() {
    use SnapshotState as S;
    for (state, read_as) in [
        (S::Running, StateXml::Running),
        (S::Paused, StateXml::Paused),
        (S::Shutoff, StateXml::Shutoff),
        (S::DiskSnapshot, StateXml::DiskSnapshot),
    ] {
        let mut shot = snapshot("a", &["vda"]);
        shot.state = state;
        let text = write(&shot, None, &domain(&["vda"]), &BTreeMap::new(), None);
        assert_eq!(read(&text).unwrap().state, Some(read_as));
    }
    for (memory, read_as) in [
        (MemoryKind::No, MemoryXml::No),
        (MemoryKind::Internal, MemoryXml::Internal),
        (MemoryKind::External, MemoryXml::External { file: None }),
    ] {
        let mut shot = snapshot("a", &["vda"]);
        shot.memory = memory;
        let text = write(&shot, None, &domain(&["vda"]), &BTreeMap::new(), None);
        assert_eq!(read(&text).unwrap().memory, Some(read_as));
    }
}

fn carried(text: &str) -> String {
    text.chars().map(|c| if is_xml_char(c) { c } else { char::REPLACEMENT_CHARACTER }).collect()
}

proptest! {
    #[test]
    fn what_is_written_reads_back(
        name in "n[^/\\p{Cc}]{0,40}", description in proptest::option::of("(?s).{1,200}"), file in "(?s)/.{0,40}",
    ) {
        let mut shot = snapshot(&name, &["vda"]);
        shot.description = description;
        let files = BTreeMap::from([(disk_name("vda"), PathBuf::from(&file))]);
        let text = write(&shot, Some(&shot), &domain(&["vda", "vdb"]), &files, None);

        let found = read(&text).unwrap();
        prop_assert_eq!(found.name.clone().map(String::from), Some(carried(&name)));
        prop_assert_eq!(found.parent, Some(carried(&name)));
        prop_assert_eq!(&found.description, &shot.description.as_deref().map(carried));
        prop_assert_eq!(found.creation_time, Some(shot.created));
        prop_assert_eq!(found.domain_uuid, Some(domain(&[]).id));
        prop_assert_eq!(&found.disks[0].source, &Some(carried(&file)));
        prop_assert_eq!(found.disks[1].snapshot, Some(DiskMode::No));

        let mut again = snapshot(found.name.unwrap().as_str(), &["vda"]);
        again.description = found.description;
        prop_assert_eq!(write(&again, Some(&again), &domain(&["vda", "vdb"]), &files, None), text);
    }
}

use std::path::Path;

use proptest::prelude::*;

use super::super::{Fault, Request};
use super::*;

fn corpus(name: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/corpus/soap");
    std::fs::read(folder.join(name)).unwrap()
}

fn wrapped(inner: &str) -> String {
    format!(
        "<e:Envelope xmlns:e=\"{ENVELOPE}\" xmlns:i=\"{SCHEMA_INSTANCE}\"><e:Body>{inner}</e:Body></e:Envelope>"
    )
}

#[test]
fn a_fault_is_known_by_its_type_whatever_the_prefix() {
    let fault = Fault::of_call(&body(&corpus("task-in-progress.xml")).unwrap());
    assert_eq!(
        (fault.kind.as_str(), fault.message.as_str()),
        ("TaskInProgress", "Another task is already in progress.")
    );
    assert!(fault.detail.moref_of("task").is_some());
    let text =
        wrapped("<e:Fault><detail><XFault i:type=\"vim25:NoPermission\" type=\"other\"/></detail></e:Fault>");
    assert_eq!(Fault::of_call(&body(text.as_bytes()).unwrap()).kind, "NoPermission");
    let untyped = wrapped("<e:Fault><detail><RestrictedVersionFault/></detail></e:Fault>");
    assert_eq!(Fault::of_call(&body(untyped.as_bytes()).unwrap()).kind, "RestrictedVersion");
}

#[test]
fn a_reference_has_two_attributes_type_and_both_are_told_apart() {
    let text = wrapped("<v i:type=\"ManagedObjectReference\" type=\"VirtualMachineSnapshot\">a[b]-1</v>");
    let value = body(text.as_bytes()).unwrap();
    assert_eq!(value.xsi_type.as_deref(), Some("ManagedObjectReference"));
    assert_eq!(value.moref(), Some(Moref::new("VirtualMachineSnapshot", "a[b]-1")));
}

#[test]
fn every_cut_of_a_real_reply_is_known_as_cut_off() {
    let whole = corpus("machine.xml");
    assert!(body(&whole).is_ok());
    for end in 0..whole.len() {
        // Behind the last tag there are only blanks.
        if !whole[end..].iter().all(u8::is_ascii_whitespace) {
            assert_eq!(body(&whole[..end]).unwrap_err(), SoapError::CutOff, "cut at {end}");
        }
    }
}

#[test]
fn what_is_larger_than_the_limits_is_refused() {
    let deep = wrapped(&"<a>".repeat(DEPTH_MAX));
    assert!(matches!(body(deep.as_bytes()), Err(SoapError::TooLarge { unit: "levels", .. })));
    let many = wrapped(&"<a/>".repeat(ELEMENTS_MAX));
    assert!(matches!(body(many.as_bytes()), Err(SoapError::TooLarge { unit: "elements", .. })));
    let wide =
        wrapped(&format!("<a {}/>", (0..40).map(|n| format!("a{n}=''")).collect::<Vec<_>>().join(" ")));
    assert!(matches!(body(wide.as_bytes()), Err(SoapError::TooLarge { .. })));
    assert!(matches!(body(&vec![b' '; BYTES_MAX + 1]), Err(SoapError::TooLarge { unit: "bytes", .. })));
}

#[test]
fn entities_of_a_dtd_and_what_is_no_soap_are_refused() {
    for text in [
        "<!DOCTYPE a [<!ENTITY b 'c'>]><a/>".to_owned(),
        wrapped("<a>&b;</a>"),
        "<html><body/></html>".to_owned(),
        "<Envelope/>".to_owned(),
        format!("{0}{0}", wrapped("<a/>")),
    ] {
        assert!(matches!(body(text.as_bytes()), Err(SoapError::Malformed(_))), "{text}");
    }
}

proptest! {
    #[test]
    fn what_is_written_is_read_again(name in "[^\\x00-\\x08\\x0b\\x0c\\x0e-\\x1f\\x7f-\\x9f\u{fffe}\u{ffff}]{0,40}") {
        let vm = Moref::new("VirtualMachine", "vm-<1>&\"");
        let text = Request::new("RenameSnapshot", &vm).text("name", &name).flag("memory", true).envelope();
        let read = body(text.as_bytes()).unwrap();
        prop_assert_eq!(read.moref_of("_this"), Some(vm));
        prop_assert_eq!(&read.child("name").unwrap().text, &name);
        prop_assert_eq!(read.flag_of("memory"), Some(true));
    }

    #[test]
    fn no_text_makes_the_reader_panic(text in "\\PC{0,300}") {
        let _ = body(text.as_bytes());
        let _ = body(wrapped(&text).as_bytes());
    }
}

//! What nobody well-meaning sends.

use super::*;

#[test]
fn what_is_not_xml_is_refused_with_its_place() {
    let cases = [
        "",
        " \n ",
        "junk",
        "<snapshot/>",
        "<domainsnapshot xmlns='urn:x'><name>a</name></domainsnapshot>",
        "<x:domainsnapshot/>",
        "<domainsnapshot/>junk",
        "<domainsnapshot/><domainsnapshot/>",
        "<domainsnapshot/>&#32;",
        "<domainsnapshot>\n  <name>m</nam>\n</domainsnapshot>",
        "<domainsnapshot>\n  <näme>x\n</domainsnapshot>",
        "<domainsnapshot>\n<name>m",
        "<domainsnapshot>\n<na",
        "</domainsnapshot>",
        "<domainsnapshot><name a=1>m</name></domainsnapshot>",
        "<domainsnapshot><name a='1' a='2'>m</name></domainsnapshot>",
        "<domainsnapshot><name a='1'b='2'>m</name></domainsnapshot>",
        "<domainsnapshot><name a>m</name></domainsnapshot>",
        "<domainsnapshot><name a='<'>m</name></domainsnapshot>",
        "<domainsnapshot><name 1='x'>m</name></domainsnapshot>",
        "<domainsnapshot><1/></domainsnapshot>",
        "<domainsnapshot><other a='&x;'/></domainsnapshot>",
        "<domainsnapshot><other a='&#1;'/></domainsnapshot>",
        "<domainsnapshot>\n<name>a&x;</name></domainsnapshot>",
        "<domainsnapshot><name>a&nbsp;</name></domainsnapshot>",
        "<domainsnapshot><name>a & b</name></domainsnapshot>",
        "<domainsnapshot><name>a&#0;</name></domainsnapshot>",
        "<domainsnapshot><name>a&#xFFFE;</name></domainsnapshot>",
        "<domainsnapshot><name>a&#99999999999;</name></domainsnapshot>",
        "<domainsnapshot><name>a\0</name></domainsnapshot>",
        "<domainsnapshot>\n<name>ä\u{1b}</name></domainsnapshot>",
        "<domainsnapshot><name>a]]></name></domainsnapshot>",
        "<domainsnapshot><name><![CDATA[a</name></domainsnapshot>",
        "<domainsnapshot><!-- a -- b --></domainsnapshot>",
        "<domainsnapshot><!-- a </domainsnapshot>",
        "<domainsnapshot><?pi </domainsnapshot>",
        "<domainsnapshot><? pi?></domainsnapshot>",
        "\n<?xml version='1.0'?><domainsnapshot/>",
        "<?xml version='7'?><domainsnapshot/>",
        "<?xml?><domainsnapshot/>",
        "<!DOCTYPE domainsnapshot><domainsnapshot/>",
        "<!DOCTYPE x SYSTEM 'file:///etc/passwd'><domainsnapshot/>",
    ];
    let lines: Vec<String> = cases.iter().map(|text| format!("{text:?}\n    {}", refusal(text))).collect();
    insta::assert_snapshot!(lines.join("\n"), @r#"
    ""
        line 1, column 1 (byte 0): the document is empty
    " \n "
        line 2, column 2 (byte 3): the document is empty
    "junk"
        line 1, column 1 (byte 0): text before the document's element
    "<snapshot/>"
        line 1, column 1 (byte 0): expecting root element of 'domainsnapshot', not 'snapshot'
    "<domainsnapshot xmlns='urn:x'><name>a</name></domainsnapshot>"
        line 1, column 1 (byte 0): expecting root element of 'domainsnapshot', not 'domainsnapshot' in a namespace
    "<x:domainsnapshot/>"
        line 1, column 1 (byte 0): expecting root element of 'domainsnapshot', not 'x:domainsnapshot' in a namespace
    "<domainsnapshot/>junk"
        line 1, column 18 (byte 17): extra content after the end of the document
    "<domainsnapshot/><domainsnapshot/>"
        line 1, column 18 (byte 17): extra content after the end of the document
    "<domainsnapshot/>&#32;"
        line 1, column 18 (byte 17): extra content after the end of the document
    "<domainsnapshot>\n  <name>m</nam>\n</domainsnapshot>"
        line 2, column 10 (byte 26): expected `</name>`, but `</nam>` was found
    "<domainsnapshot>\n  <näme>x\n</domainsnapshot>"
        line 3, column 1 (byte 28): expected `</näme>`, but `</domainsnapshot>` was found
    "<domainsnapshot>\n<name>m"
        line 2, column 1 (byte 17): this element is never closed
    "<domainsnapshot>\n<na"
        line 2, column 1 (byte 17): tag not closed: `>` not found before end of input
    "</domainsnapshot>"
        line 1, column 1 (byte 0): close tag `</domainsnapshot>` does not match any open tag
    "<domainsnapshot><name a=1>m</name></domainsnapshot>"
        line 1, column 25 (byte 24): an attribute's value must stand in quotes
    "<domainsnapshot><name a='1' a='2'>m</name></domainsnapshot>"
        line 1, column 29 (byte 28): an attribute is given twice
    "<domainsnapshot><name a='1'b='2'>m</name></domainsnapshot>"
        line 1, column 17 (byte 16): attributes must be separated by blanks
    "<domainsnapshot><name a>m</name></domainsnapshot>"
        line 1, column 24 (byte 23): an attribute's name must be followed by '='
    "<domainsnapshot><name a='<'>m</name></domainsnapshot>"
        line 1, column 17 (byte 16): '<' in the value of attribute 'a'
    "<domainsnapshot><name 1='x'>m</name></domainsnapshot>"
        line 1, column 17 (byte 16): '1' is no name of an attribute
    "<domainsnapshot><1/></domainsnapshot>"
        line 1, column 17 (byte 16): '1' is no name of an element
    "<domainsnapshot><other a='&x;'/></domainsnapshot>"
        line 1, column 17 (byte 16): attribute 'a': entity 'x' is not defined
    "<domainsnapshot><other a='&#1;'/></domainsnapshot>"
        line 1, column 17 (byte 16): attribute 'a': character U+0001 is not allowed in XML
    "<domainsnapshot>\n<name>a&x;</name></domainsnapshot>"
        line 2, column 8 (byte 24): entity 'x' is not defined
    "<domainsnapshot><name>a&nbsp;</name></domainsnapshot>"
        line 1, column 24 (byte 23): entity 'nbsp' is not defined
    "<domainsnapshot><name>a & b</name></domainsnapshot>"
        line 1, column 25 (byte 24): entity or character reference not closed: `;` not found before end of input
    "<domainsnapshot><name>a&#0;</name></domainsnapshot>"
        line 1, column 24 (byte 23): invalid character reference: 0x0 character is not permitted in XML
    "<domainsnapshot><name>a&#xFFFE;</name></domainsnapshot>"
        line 1, column 24 (byte 23): character U+FFFE is not allowed in XML
    "<domainsnapshot><name>a&#99999999999;</name></domainsnapshot>"
        line 1, column 24 (byte 23): invalid character reference: number too large to fit in target type
    "<domainsnapshot><name>a\0</name></domainsnapshot>"
        line 1, column 24 (byte 23): character U+0000 is not allowed in XML
    "<domainsnapshot>\n<name>ä\u{1b}</name></domainsnapshot>"
        line 2, column 8 (byte 25): character U+001B is not allowed in XML
    "<domainsnapshot><name>a]]></name></domainsnapshot>"
        line 1, column 23 (byte 22): ']]>' must not stand in text
    "<domainsnapshot><name><![CDATA[a</name></domainsnapshot>"
        line 1, column 23 (byte 22): CDATA not closed: `]]>` not found before end of input
    "<domainsnapshot><!-- a -- b --></domainsnapshot>"
        line 1, column 24 (byte 23): forbidden string `--` was found in a comment
    "<domainsnapshot><!-- a </domainsnapshot>"
        line 1, column 17 (byte 16): comment not closed: `-->` not found before end of input
    "<domainsnapshot><?pi </domainsnapshot>"
        line 1, column 17 (byte 16): processing instruction not closed: `?>` not found before end of input
    "<domainsnapshot><? pi?></domainsnapshot>"
        line 1, column 17 (byte 16): a processing instruction must have a name
    "\n<?xml version='1.0'?><domainsnapshot/>"
        line 2, column 1 (byte 1): an XML declaration must stand at the start
    "<?xml version='7'?><domainsnapshot/>"
        line 1, column 1 (byte 0): unknown XML version: either 1.0 or 1.1 is expected
    "<?xml?><domainsnapshot/>"
        line 1, column 1 (byte 0): an XML declaration does not contain `version` attribute
    "<!DOCTYPE domainsnapshot><domainsnapshot/>"
        line 1, column 1 (byte 0): a document type declaration is not accepted
    "<!DOCTYPE x SYSTEM 'file:///etc/passwd'><domainsnapshot/>"
        line 1, column 1 (byte 0): a document type declaration is not accepted
    "#);
}

#[test]
fn an_entity_bomb_is_refused_unread() {
    let mut text = String::from("<!DOCTYPE lolz [<!ENTITY lol 'lol'>");
    for level in 1..10 {
        text.push_str(&format!("<!ENTITY lol{level} '{}'>", "&lol;".repeat(10)));
    }
    text.push_str("]><domainsnapshot><name>&lol9;</name></domainsnapshot>");
    assert_eq!(refusal(&text), "line 1, column 1 (byte 0): a document type declaration is not accepted");
}

#[test]
fn limits() {
    let nested = |depth: usize| in_root(&("<a>".repeat(depth - 1) + &"</a>".repeat(depth - 1)));
    assert!(read(&nested(DEPTH_MAX)).is_ok());
    assert!(refusal(&nested(DEPTH_MAX + 1)).ends_with("elements are nested deeper than 64"));
    assert!(refusal(&"<domainsnapshot>".repeat(60_000)).ends_with("elements are nested deeper than 64"));

    let disks = |count: usize| in_root(&format!("<disks>{}</disks>", "<disk name='a'/>".repeat(count)));
    assert_eq!(read(&disks(DISKS_MAX)).unwrap().disks.len(), DISKS_MAX);
    assert_eq!(
        refusal(&disks(DISKS_MAX + 1)),
        "the list of disks is too large: at most 1024 disks are accepted"
    );

    let described = |bytes: usize| in_root(&format!("<description>{}</description>", "x".repeat(bytes)));
    assert!(read(&described(DESCRIPTION_BYTES_MAX)).is_ok());
    assert_eq!(
        refusal(&described(DESCRIPTION_BYTES_MAX + 1)),
        "the description is too large: at most 65536 bytes are accepted"
    );

    let named =
        |element: &str, bytes: usize| in_root(&format!("<{element}>{}</{element}>", "x".repeat(bytes)));
    assert!(read(&named("name", 255)).is_ok());
    assert_eq!(refusal(&named("name", 256)), "a snapshot name has at most 255 bytes, this one has 256");
    let parent = in_root(&format!("<parent><name>{}</name></parent>", "x".repeat(256)));
    assert!(refusal(&parent).starts_with("the parent's name is too large"));

    let attribute = |bytes: usize| in_root(&format!("<other a='{}'/>", "x".repeat(bytes)));
    assert!(read(&attribute(1 << 19)).is_ok());
    assert!(refusal(&attribute(TEXT_BYTES_MAX)).starts_with("the document is too large"));
    let mode = in_root(&format!("<memory snapshot='{}'/>", "x".repeat(1 << 19)));
    assert!(refusal(&mode).len() < 200, "errors quote only a little");

    let many: String = (0..60_000).map(|n| format!(" a{n}='x'")).collect();
    assert!(refusal(&in_root(&format!("<other{many}/>"))).ends_with("more than 256 attributes"));
}

/// Texts made of what parsers stumble over.
fn fragments() -> impl Strategy<Value = String> {
    let fragment = prop_oneof![
        Just("<domainsnapshot>"),
        Just("</domainsnapshot>"),
        Just("<name>"),
        Just("</name>"),
        Just("<name"),
        Just("<disks>"),
        Just("<disk name='"),
        Just("</disks>"),
        Just("'/>"),
        Just("/>"),
        Just("<memory snapshot="),
        Just("'no'"),
        Just("\"external\""),
        Just(" file='/m'"),
        Just("<![CDATA["),
        Just("]]>"),
        Just("<!--"),
        Just("-->"),
        Just("<?"),
        Just("?>"),
        Just("<?xml version='1.0'?>"),
        Just("<!DOCTYPE"),
        Just("<!"),
        Just("&"),
        Just("&#"),
        Just("&#x"),
        Just("&lt;"),
        Just(";"),
        Just("<"),
        Just(">"),
        Just("'"),
        Just("="),
        Just("a"),
        Just(" "),
        Just("\n"),
        Just("ä"),
        Just("\u{feff}"),
        Just("\0"),
        Just("𝄞"),
        Just(":"),
        Just("<creationTime>"),
        Just("9"),
        Just("</"),
        Just("<source"),
        Just("<domain><uuid>"),
    ];
    proptest::collection::vec(fragment, 0..40).prop_map(|parts| parts.concat())
}

proptest! {
    #[test]
    fn no_text_panics(text in "(?s).{0,300}") {
        let _ = read(&text);
        let _ = read(&in_root(&text));
    }

    #[test]
    fn no_pile_of_fragments_panics(text in fragments()) {
        for text in [&text, &in_root(&text), &format!("<domainsnapshot>{text}")] {
            if let Ok(found) = read(text) {
                let _ = found.to_create(&domain_disks(&["a", "vda"]));
            }
        }
    }
}

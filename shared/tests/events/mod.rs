//! Any valid event: every attribute, extensions of every type, data of every kind, text of any script.
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use proptest::prelude::*;
use serde_json::{Map, Value as Json, json};
use warren_shared::{Event, Limits};

/// Text of at least one character and at most `max` bytes, without control characters.
fn text(max: usize) -> impl Strategy<Value = String> {
    let word = prop_oneof![
        3 => "[ -~]{1,40}",
        2 => "\\PC{1,40}",
        1 => Just("'\"\\\u{2028}\u{feff}é🐇".to_owned()),
        1 => Just("é".repeat(max / 2)),
        1 => Just("x".repeat(max)),
    ];
    word.prop_filter_map("it is too long, or is_control", move |text| {
        (text.len() <= max && !text.chars().any(char::is_control)).then_some(text)
    })
}

fn json_value() -> impl Strategy<Value = Json> {
    let leaf = prop_oneof![
        Just(Json::Null),
        any::<bool>().prop_map(Json::from),
        any::<i64>().prop_map(Json::from),
        any::<u64>().prop_map(Json::from),
        (-1e300..1e300).prop_map(Json::from),
        any::<String>().prop_map(Json::from),
    ];
    leaf.prop_recursive(4, 32, 5, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Json::from),
            prop::collection::btree_map(any::<String>(), inner, 0..5).prop_map(|map| map.into_iter().collect()),
        ]
    })
}

/// Content type and data, each as members of the structured form.
fn data() -> impl Strategy<Value = Map<String, Json>> {
    let json_type = prop_oneof!["application/json", "application/vnd[.]shop[+]json; charset=utf-8", "TEXT/JSON"];
    let text_type = prop_oneof!["text/plain", "text/csv; charset=utf-8", "text/html;charset=latin1", "application/xml"];
    let bytes_type = prop_oneof!["image/png", "application/octet-stream"];
    let any_type = prop_oneof![json_type.clone(), text_type.clone(), bytes_type.clone()];
    let bytes = || prop::collection::vec(any::<u8>(), 0..60);
    let body = |data: Json, binary: bool| if binary { BASE64.encode(data.to_string()).into() } else { data };
    prop_oneof![
        Just(json!({})),
        any_type.prop_map(|t| json!({"datacontenttype": t})),
        json_value().prop_map(|data| json!({"data": data})),
        (json_type.clone(), json_value()).prop_map(|(t, data)| json!({"datacontenttype": t, "data": data})),
        (text_type.clone(), any::<String>()).prop_map(|(t, data)| json!({"datacontenttype": t, "data": data})),
        (text_type.clone(), json_value()).prop_map(|(t, data)| json!({"datacontenttype": t, "data": data})),
        (bytes_type, bytes()).prop_map(|(t, b)| json!({"datacontenttype": t, "data_base64": BASE64.encode(b)})),
        (json_type, json_value())
            .prop_map(move |(t, data)| json!({"datacontenttype": t, "data_base64": body(data, true)})),
        (text_type, any::<String>())
            .prop_map(|(t, data)| json!({"datacontenttype": t, "data_base64": BASE64.encode(data)})),
        // Without a type bytes are looked at, and these cannot be taken for JSON that is broken.
        bytes().prop_map(|b| json!({"data_base64": BASE64.encode([b"\xff".as_slice(), &b].concat())})),
        "[a-z ]{0,20}".prop_map(|text| json!({"data_base64": BASE64.encode(text)})),
    ]
    .prop_map(|json| json.as_object().expect("an object").clone())
}

fn attributes() -> impl Strategy<Value = Map<String, Json>> {
    let time = prop_oneof![
        Just("1969-12-31T23:59:59Z".to_owned()),
        "20[0-9]{2}-0[1-9]-[0-2][1-8][Tt]1[0-9]:[0-5][0-9]:[0-5][0-9]([.][0-9]{1,9})?(Z|z|[+-]1[0-9]:30)",
    ];
    let value = prop_oneof![
        any::<bool>().prop_map(Json::from),
        any::<i64>().prop_map(Json::from),
        Just(Json::from("")),
        text(4096).prop_map(Json::from),
    ];
    let options = (
        prop::option::of(text(4096)),
        prop::option::of(time),
        prop::option::of(text(4096)),
        prop::option::of(text(255)),
        prop::option::of(0..=9_u8),
    );
    // Behind an x no name is one of the attributes that have rules of their own.
    (options, prop::collection::btree_map("x[a-z0-9]{0,30}", value, 0..5)).prop_map(
        |((subject, time, schema, key, priority), others)| {
            let mut map: Map<_, _> = others.into_iter().collect();
            let texts = [("subject", subject), ("time", time), ("dataschema", schema), ("partitionkey", key)];
            map.extend(texts.into_iter().filter_map(|(name, value)| Some((name.into(), value?.into()))));
            map.extend(priority.map(|p| ("priority".into(), p.into())));
            map
        },
    )
}

/// Any event that is valid.
pub(crate) fn events() -> impl Strategy<Value = Event> {
    (text(255), text(4096), text(255), attributes(), data()).prop_map(|(id, source, kind, attributes, data)| {
        let mut map = json!({"specversion": "1.0", "id": id, "source": source, "type": kind});
        map.as_object_mut().expect("an object").extend(attributes.into_iter().chain(data));
        Event::from_json(map.to_string().as_bytes(), Limits::default()).unwrap_or_else(|e| panic!("{e}: {map}"))
    })
}

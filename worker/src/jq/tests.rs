//! What programs return, and how they end that would not.
use super::*;
use std::time::Instant;

const LIMITS: Limits = Limits { time: Duration::from_millis(300), output: 1 << 20 };
const LATE: JqError = JqError::Late(LIMITS.time);
/// Machines that run tests are busy.
const PATIENT: Limits = Limits { time: Duration::from_secs(20), ..LIMITS };

fn run(program: &str, input: &str) -> Result<Vec<String>, JqError> {
    run_in(program, input, PATIENT)
}

fn run_in(program: &str, input: &str, limits: Limits) -> Result<Vec<String>, JqError> {
    let jq = Jq::compile(program).unwrap_or_else(|error| panic!("{program}: {error}"));
    let outputs = jq.run(input.as_bytes(), limits)?;
    Ok(outputs.into_iter().map(|json| String::from_utf8(json).expect("UTF-8")).collect())
}

#[track_caller]
fn check(program: &str, input: &str, expect: &[&str]) {
    assert_eq!(
        run(program, input).as_deref(),
        Ok(&expect.iter().map(ToString::to_string).collect::<Vec<_>>()[..]),
        "{program}"
    );
}

#[test]
fn programs_do_what_they_do_in_jq() {
    let order =
        r#"{"type":"order.placed","data":{"id":7,"total":100.50,"items":[{"sku":"a","n":2},{"sku":"b","n":3}]}}"#;
    check(".data.total > 100", order, &["true"]);
    check("{order: .data.id, total: .data.total}", order, &[r#"{"order":7,"total":100.50}"#]);
    check(".data.items[] | select(.n > 2) | .sku", order, &["\"b\""]);
    check(".data.items | map(.n) | add", order, &["5"]);
    check("[.data.items[].sku] | join(\", \")", order, &["\"a, b\""]);
    check(".data.missing.deeper", order, &["null"]);
    check(".data | del(.items) | keys", order, &[r#"["id","total"]"#]);
    check(".data.items |= length | .data.items", order, &["2"]);
    check(".data.items[0].n += 1 | .data.items[0]", order, &[r#"{"sku":"a","n":3}"#]);
    check(".type | test(\"^order\\\\.\")", order, &["true"]);
    check("\"\\(.data.id): \\(.type)\"", order, &["\"7: order.placed\""]);
    check(".data.items | group_by(.sku) | length", order, &["2"]);
    check(".data.items[1:] | .[0].sku", order, &["\"b\""]);
    check("[paths] | length", order, &["11"]);
    check("reduce .data.items[] as $i (0; . + $i.n)", order, &["5"]);
    check(".data.items | sort_by(-.n) | first.sku", order, &["\"b\""]);
    check("with_entries(select(.key == \"type\"))", order, &[r#"{"type":"order.placed"}"#]);
    check(".a = 1 | .b.c = 2", "null", &[r#"{"a":1,"b":{"c":2}}"#]);
    check(".[1:3] = [9] | .[-1] = 0", "[1,2,3,4]", &["[1,9,0]"]);
    check(
        "[1,2,3] - [2], [1,2,1] == [1,2,1], ([1,2,1] | index(1)), (\"aäa\" | indices(\"a\"))",
        "0",
        &["[1,3]", "true", "0", "[0,2]"],
    );
    check(
        "\"a,b\" / \",\", \"ab\" * 2, ({a: {b: 1}} * {a: {c: 2}})",
        "0",
        &[r#"["a","b"]"#, "\"abab\"", r#"{"a":{"b":1,"c":2}}"#],
    );
    check(
        "[.[] | tojson | fromjson], (\"12\" | tonumber), (\"äb\" | length), (-3 | length)",
        "[1,[2]]",
        &["[1,[2]]", "12", "2", "3"],
    );
    check(
        "has(\"a\"), contains({a: 1}), (try error(\"x\") catch .), ([.[]?] | unique), (.a as $x | $x)",
        r#"{"a":1}"#,
        &["true", "true", "\"x\"", "[1]", "1"],
    );
    check("1700000000 | todate", "0", &["\"2023-11-14T22:13:20Z\""]);
    check("empty", "0", &[]);
}

#[test]
fn numbers_stay_as_they_are_written() {
    check(".", "[1.10,12345678901234567890123,1e400,-0.0]", &["[1.10,12345678901234567890123,1e400,-0.0]"]);
    let digits = "{\"a\":[12345678901234567890123,12345678901234567.89,1.10,1E2,-0.0]}";
    for program in [
        ".",
        "{a}",
        "{a: [.a[]]}",
        ".a |= map(.)",
        "tojson | fromjson",
        ". + {}",
        "{a: (.a | map(tostring | tonumber))}",
    ] {
        check(program, digits, &[digits]);
    }
    check(".[0] + 1", "[12345678901234567890123]", &["12345678901234567890124"]);
}

#[test]
fn nothing_of_the_machine_can_be_seen_or_touched() {
    for program in [
        "env",
        "$ENV",
        "input",
        "inputs",
        "halt",
        "halt_error",
        "halt(1)",
        "debug",
        "debug(.)",
        "stderr",
        "now",
        "localtime",
        "input_filename",
        "$__prog_args",
    ] {
        let error = Jq::compile(program).expect_err(program);
        assert!(error.contains("there is no such"), "{program}: {error}");
    }
    assert!(Jq::compile("include \"x\"; .").expect_err("no modules").contains("no modules"));
}

#[test]
fn mistakes_name_the_place_and_what() {
    for (program, wanted) in [
        (".a | foo", "at 'foo' (column 6): there is no such filter"),
        (".a |\n $x", "at '$x' (line 2, column 2): there is no such variable"),
        ("if . then 1", "is wanted"),
        (".a | )", "')'"),
        ("[1, 2", "closing bracket"),
        ("", "at the end (column 1): term is wanted"),
        ("\"\\q\"", "string escape"),
    ] {
        let error = Jq::compile(program).expect_err(program);
        assert!(error.contains(wanted), "{program}: {error}");
    }
}

#[test]
fn errors_name_kinds_and_no_values() {
    for (program, wanted) in [
        (".data | keys", "cannot use number as iterable (array or object)"),
        (".data + \"x\"", "cannot calculate number + string"),
        (".secret | .x", "cannot index string with string"),
        (".secret | tonumber", "not valid JSON at line 1, column 1"),
        ("error(\"no total\")", "no total"),
        ("error({a: 1})", "it threw a value of kind object"),
        ("{(.data): 1}", "cannot use number as key of an object: use a string"),
        (".data % 0", "a number cannot be divided by zero"),
        ("label $f | break $f, error(null)", "it threw a value of kind null"),
    ] {
        let Err(JqError::Failed(error)) = run(program, r#"{"data":123456,"secret":"hunter2"}"#) else {
            assert!(program.starts_with("label"), "{program} did not fail");
            continue;
        };
        assert_eq!(error, wanted, "{program}");
    }
}

/// Every one of them would run for ever, eat all memory or overflow the stack.
#[test]
fn whatever_a_program_does_its_run_ends() {
    let mut wrong = Vec::new();
    for (program, ends) in [
        ("[range(1e12)]", &[LATE, JqError::Large][..]),
        ("last(range(1e12))", &[LATE]),
        ("last(repeat(1))", &[LATE]),
        ("def f: f; f", &[LATE]),
        ("def f: [f]; f", &[JqError::Deep]),
        ("def f: f | .; f", &[JqError::Deep, LATE]),
        ("def f: (., 1) | f; f", &[JqError::Deep, LATE]),
        ("until(false; .)", &[LATE]),
        ("[recurse(.)]", &[LATE, JqError::Large]),
        ("last(recurse(.))", &[LATE]),
        ("repeat(.)", &[JqError::Many]),
        ("\"x\" * 10000000000", &[JqError::Large]),
        ("\"x\" * 99999999999999999999999", &[JqError::Large]),
        ("reduce range(60) as $i (\"x\"; . + .)", &[JqError::Large]),
        ("reduce range(60) as $i ([1]; . + .)", &[JqError::Large]),
        ("reduce range(60) as $i (1; [., .])", &[JqError::Large]),
        ("reduce range(60) as $i (1; {a: ., b: .}) | tojson", &[JqError::Large]),
        ("reduce range(1000000) as $i (1; [.])", &[JqError::Deep]),
        ("reduce range(1000000) as $i (1; {a: .})", &[JqError::Deep]),
        ("reduce range(1000000) as $i ({}; {a: .} * {b: 1})", &[JqError::Deep]),
        ("last(path(recurse(.a)))", &[JqError::Deep, LATE]),
        ("[1] | last(path(recurse(.[0:])))", &[JqError::Deep, LATE]),
        ("def f: .a | f; f", &[JqError::Deep]),
        ("def f: .[0:] | f; [1] | f", &[JqError::Deep]),
        ("[range(100000)] | . as $x | contains($x | reverse)", &[LATE]),
        ("[limit(100000; repeat(1))] | indices(.[:50000] + [0])", &[LATE]),
        ("(\"a\" * 1000000) as $x | ($x | indices(\"a\" * 500000 + \"b\"))", &[LATE]),
        ("[range(1000000)] | sort_by(-.) | sort_by(-.) | sort_by(-.) | sort_by(-.)", &[LATE]),
        ("[limit(1000000000; repeat(1))] | length", &[LATE, JqError::Large]),
        ("\"x\" * 30000000 / \"\" | length", &[JqError::Large]),
        ("[foreach repeat(1) as $x (0; . + $x)] | length", &[LATE, JqError::Large]),
        ("try last(repeat(1)) catch .", &[LATE]),
        ("(def f: [f]; f)?", &[JqError::Deep]),
        (".. |= [.] | .. |= [.] | def f: (.. |= [.]) | f; f", &[LATE, JqError::Deep]),
        (
            "null | .[0] |= [.] | def f: .a |= f; f",
            &[JqError::Deep, JqError::Failed("cannot index null with number".into())],
        ),
        ("def f: .a |= f; f", &[JqError::Deep]),
        ("\"x\" * 2000000", &[JqError::Long(LIMITS.output)]),
    ] {
        let begun = Instant::now();
        match run_in(program, "null", LIMITS) {
            Err(end) if ends.contains(&end) => {}
            Err(end) => wrong.push(format!("{program}: {end}")),
            Ok(outputs) => wrong.push(format!("{program}: {} outputs", outputs.len())),
        }
        if begun.elapsed() > PATIENT.time {
            wrong.push(format!("{program}: took {:?}", begun.elapsed()));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn a_function_that_calls_itself_ends_wherever_the_call_stands() {
    let mut wrong = Vec::new();
    for body in [
        "f | f",
        "f, 1",
        "1, (f | . + 1)",
        "[f]",
        "{a: f}",
        "\"\\(f)\"",
        "-f",
        "f + 1",
        "f == 1",
        "f and true",
        "f // 1",
        "f?",
        "try f catch .",
        "f as $x | $x",
        "f as [$x] | $x",
        "if f then 1 else 2 end",
        "reduce f as $x (0; 1)",
        "reduce 1 as $x (f; 1)",
        "reduce 1 as $x (0; f)",
        "foreach f as $x (0; 1; 2)",
        "label $l | f | 1",
        "path(f)",
        "first(f)",
        "last(f)",
        "[limit(1; f)]",
        "isempty(f)",
        "f |= 1",
        ".[f]",
        ".[f:]",
        "[2, 1] | sort_by(f)",
        "[1] | group_by(f)",
        "[1] | map(f)",
        "{a: 1} | map_values(f)",
        "[1] | .[0] |= f",
        "walk(f)",
        "def g: f; [g]",
        "def g(h): [h]; g(f)",
        "recurse(f)",
        "[1] | .[] += f",
        "error(f)",
        "getpath(f)",
        "del(f)",
        "[(1, 2) | f]",
        "[1] | any(f)",
        "\"a\" | sub(\"a\"; f)",
    ] {
        match run_in(&format!("def f: {body}; [f]"), "null", LIMITS) {
            Err(JqError::Deep | JqError::Late(_) | JqError::Large) => {}
            Err(JqError::Failed(error)) if error.starts_with("invalid path expression") => {}
            end => wrong.push(format!("{body}: {end:?}")),
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn what_is_as_deep_as_it_may_be_can_be_used() {
    for (make, ends) in [("[.]", "[[[["), ("{a: .}", "{\"a\":{\"a\":")] {
        let deep = format!("reduce range(128) as $i (1; {make})");
        assert!(run(&deep, "null").expect("deep")[0].starts_with(ends));
        for with in [
            ". == .",
            "[.] | unique | length",
            "tojson | length",
            "\"\\(.)\" | length",
            "[..] | length",
            "[paths] | length",
        ] {
            let begun = run(&format!("{deep} | {with}"), "null");
            assert!(matches!(begun, Ok(_) | Err(JqError::Deep)), "{with}: {begun:?}");
        }
        for with in [
            ".. |= .",
            "walk(.)",
            "del(..)",
            "[leaf_paths?]",
            "flatten",
            "{(tojson): 1}",
            "group_by(.)",
            "tojson | fromjson",
            ". - .",
            ". * .",
        ] {
            let _ = Jq::compile(&format!("{deep} | {with}")).map(|jq| jq.run(b"null", PATIENT));
        }
    }
}

#[test]
fn numbers_do_not_grow_without_end() {
    for program in
        ["reduce range(60) as $i (10; . * .)", "reduce range(400) as $i (12345678901234567890; . * 1234567890)"]
    {
        let Err(JqError::Failed(error)) = run(program, "0") else { panic!("{program}") };
        assert!(error.contains("1000 digits"), "{error}");
    }
    let Err(JqError::Failed(error)) = run(".", &format!("[1, {}]", "9".repeat(1_001))) else { panic!("too long") };
    assert!(error.contains("1001 digits"), "{error}");
    assert!(run(".", &format!("[\"{}\", {}]", "9".repeat(5_000), "9".repeat(1_000))).is_ok());
}

#[test]
fn a_function_that_calls_itself_takes_values() {
    for program in [
        "def f(g): f(g); f(.)",
        "def f(g): def h: f(g); h; f(.)",
        "[.[] | {a: (def f($x; g): if . then f($x; g) else . end; f(1; .))}]",
    ] {
        assert!(Jq::compile(program).expect_err(program).contains("'f' calls itself"), "{program}");
    }
    check("def f($n): if $n > 0 then f($n - 1) else . end; f(20000)", "7", &["7"]);
    check("def f(g): g; def h: f(f(.)); h", "7", &["7"]);
}

#[test]
fn a_run_leaves_no_trace_for_the_next() {
    let jq = Jq::compile("if . == 0 then last(repeat(1)) else . end").expect("valid");
    assert_eq!(jq.run(b"0", LIMITS), Err(JqError::Late(LIMITS.time)));
    assert_eq!(jq.run(b"1", LIMITS), Ok(vec![b"1".to_vec()]));
    let again = jq.clone();
    let other = std::thread::spawn(move || again.run(b"2", LIMITS));
    assert_eq!(other.join().expect("no panic"), Ok(vec![b"2".to_vec()]));
}

#[test]
fn every_function_of_jq_is_there_but_those_that_the_docs_name() {
    // The builtins of jq 1.7 and 1.8, as jq's manual has them.
    let all = "@base32 @base32d @base64 @base64d @csv @html @json @sh @text @tsv @uri @urid abs acos acosh add add(.) all all(.) \
        all(.;.) any any(.) any(.;.) arrays ascii ascii_downcase ascii_upcase asin asinh atan atan2(.;.) atanh booleans bsearch(1) \
        capture(.) capture(.;.) cbrt ceil combinations combinations(2) contains(1) copysign(.;.) cos cosh date dateadd(.;.) \
        datesub(.;.) del(.a) delpaths([]) drem(.;.) empty endswith(1) error error(.) exp exp10 exp2 explode expm1 fabs fdim(.;.) \
        finites first first(.) flatten flatten(1) floor fma(.;.;.) fmax(.;.) fmin(.;.) fmod(.;.) format(.) frexp from_entries \
        fromdate fromdateiso8601 fromjson fromstream(.) gamma getpath([]) gmtime group_by(.) gsub(.;.) gsub(.;.;.) has(1) \
        have_decnum have_literal_numbers hypot(.;.) implode IN(.) IN(.;.) in(.) INDEX(.) INDEX(.;.) index(1) indices(1) infinite \
        inside(.) isempty(.) JOIN(.;.) JOIN(.;.;.) JOIN(.;.;.;.) isfinite isinfinite isnan isnormal isvalid(.) iterables j0 j1 join(1) keys keys_unsorted last last(.) \
        ldexp(.;.) leaf_paths length lgamma limit(1;.) log log10 log1p log2 logb ltrim ltrimstr(1) map(.) map_values(.) match(.) \
        match(.;.) max max_by(.) min min_by(.) mktime modf nan nearbyint nextafter(.;.) nexttoward(.;.) normals not nth(1) nth(1;.) \
        nulls numbers objects path(.) paths paths(.) pick(.a) pow(.;.) pow10 range(1) range(1;2) range(1;2;3) recurse recurse(.) \
        recurse(.;.) repeat(.) reverse rindex(1) rint round rtrim rtrimstr(1) scalars scalb(.;.) scalbln(.;.) scan(.) scan(.;.) \
        select(.) setpath([];.) significand sin sinh skip(1;.) sort sort_by(.) split(1) split(1;1) splits(1) splits(1;1) sqrt \
        startswith(1) strftime(.) strings strptime(.) sub(.;.) sub(.;.;.) tan tanh test(.) test(.;.) tgamma toarray toboolean todate \
        todateiso8601 tojson tonumber tostream tostring to_entries transpose trim trimstr(1) trunc truncate_stream(.) type unique \
        unique_by(.) until(.;.) utf8bytelength values walk(.) while(.;.) with_entries(.) y0 y1";
    for program in all.split_whitespace() {
        assert!(Jq::compile(program).is_ok(), "{program}: {:?}", Jq::compile(program));
    }
    let docs = include_str!("../../../docs/operations.md");
    for name in "env $ENV now localtime strflocaltime input inputs debug stderr halt halt_error input_filename input_line_number \
        builtins get_search_list lgamma_r $__loc__"
        .split_whitespace()
    {
        assert!(Jq::compile(name).is_err() || Jq::compile(&format!("{name}(.)")).is_err(), "{name}");
        assert!(docs.contains(&format!("`{name}`")), "docs/operations.md says that {name} is not there");
    }
}

#[test]
fn what_jaq_lacks_does_what_it_does_in_jq() {
    check("@csv", r#"[1,1.50,"a\"b, c",null,true,""]"#, &[r#""1,1.50,\"a\"\"b, c\",,true,\"\"""#]);
    check("@tsv", "[\"a\\tb\\\\c\\nd\\r\",null,false,1e2]", &["\"a\\\\tb\\\\\\\\c\\\\nd\\\\r\\t\\tfalse\\t1e2\""]);
    check("@csv, @tsv", "[]", &["\"\"", "\"\""]);
    check("@csv \"x\\(.)y\"", "[\"a\"]", &["\"x\\\"a\\\"y\""]);
    check("try @csv catch .", "[[1]]", &["\"array is not valid in a csv row\""]);
    check("try @tsv catch .", "{}", &["\"object cannot be tsv-formatted, only an array can be\""]);
    for (text, base32) in [
        ("", ""),
        ("f", "MY======"),
        ("fo", "MZXQ===="),
        ("foo", "MZXW6==="),
        ("foob", "MZXW6YQ="),
        ("fooba", "MZXW6YTB"),
        ("foobar", "MZXW6YTBOI======"),
        ("ä€", "YOSOFAVM"),
    ] {
        check(
            "@base32, (@base32 | @base32d)",
            &format!("\"{text}\""),
            &[&format!("\"{base32}\""), &format!("\"{text}\"")],
        );
    }
    check("format(\"csv\"), format(\"base64\")", "[1]", &["\"1\"", "\"WzFd\""]);
    check("IN(1, 2), IN(.[]?; 3), (2 | IN(1, 2))", "[3]", &["false", "true", "true"]);
    check(
        "INDEX(.id), INDEX(.[]; .n)",
        r#"[{"id":1,"n":"x"},{"id":1,"n":"y"}]"#,
        &[r#"{"1":{"id":1,"n":"y"}}"#, r#"{"x":{"id":1,"n":"x"},"y":{"id":1,"n":"y"}}"#],
    );
    check("JOIN({a: 1}; .), [JOIN({a: 1}; .[]; .; last)]", r#"["a","b"]"#, &[r#"[["a",1],["b",null]]"#, "[1,null]"]);
    check(
        "[tostream]",
        r#"{"a":[1,{"b":2}],"c":[]}"#,
        &[r#"[[["a",0],1],[["a",1,"b"],2],[["a",1,"b"]],[["a",1]],[["c"],[]],[["c"]]]"#],
    );
    for value in [r#"{"a":[1,{"b":2}],"c":[]}"#, "[1,[2,[3,{}]]]", "5", "null", "[]", "[null,{\"x\":[false]}]"] {
        check("fromstream(tostream)", value, &[value]);
    }
    check("[fromstream((1, [2]) | tostream)]", "0", &["[1,[2]]"]);
    check("[1 | truncate_stream([[0],1],[[1,0],2],[[1,0]],[[1]])]", "0", &["[[[0],2],[[0]]]"]);
    check(
        "date, dateadd(\"seconds\"; 60), datesub(\"seconds\"; 1)",
        "1700000000",
        &["\"2023-11-14T22:13:20Z\"", "1700000060", "1699999999"],
    );
    check(
        "(65 | ascii), (\"x\" | toarray), ([1] | toarray), (\"xax\" | trimstr(\"x\"))",
        "0",
        &["\"A\"", "[\"x\"]", "[1]", "\"a\""],
    );
    check("bsearch(0), bsearch(1), bsearch(2), bsearch(3), bsearch(9)", "[1,3,5]", &["-1", "0", "-2", "1", "-4"]);
    check("isvalid(.a), isvalid(error(\"x\")), [leaf_paths]", r#"{"a":{"b":1}}"#, &["true", "false", r#"[["a","b"]]"#]);
    // None of them makes more, or takes longer, than a program may.
    assert_eq!(run_in("[repeat(1)] | @csv", "0", LIMITS), Err(LATE));
    assert!(run_in("fromstream(repeat([[100000000], 1]))", "0", LIMITS).is_err());
    assert!(run_in("fromstream([[range(100000) | \"a\"], 1], [[\"a\"]])", "0", LIMITS).is_err());
}

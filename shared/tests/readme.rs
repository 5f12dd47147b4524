//! The README's table of variables is the table in the code. `UPDATE=1` writes it.
#![expect(clippy::disallowed_methods, reason = "a test may read the README")]
use warren_shared::env;

const BEGIN: &str = "<!-- variables: begin -->\n";
const END: &str = "<!-- variables: end -->";

#[test]
fn the_readme_lists_every_variable_as_the_code_does() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md");
    let readme = std::fs::read_to_string(path).expect("the README is there");
    let (before, rest) = readme.split_once(BEGIN).expect("the marker is there");
    let (_, after) = rest.split_once(END).expect("the marker is there");
    let wanted = format!("{before}{BEGIN}{}{END}{after}", env::markdown());
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(path, &wanted).expect("writable");
    } else {
        assert!(
            readme == wanted,
            "the README is behind the code: run 'UPDATE=1 cargo test -p warren-shared --test readme'"
        );
    }
}

//! Pictures of processes, in the languages of Graphviz and Mermaid.
use super::instances::word;
use std::fmt::Write;
use warren_shared::process::{Definition, Instance, Place};

/// A language for pictures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    /// Graphviz.
    Dot,
    /// Mermaid.
    Mermaid,
}

/// Draws a definition, or where an instance of it stands.
pub(crate) fn draw(definition: &Definition, instance: Option<&Instance>, style: Style) -> String {
    let mut text = String::new();
    // Names are of a-z, 0-9, - and _, event types without spaces or control characters: nothing has to be escaped but quotes.
    let clean = |text: &str| text.replace(['"', '\\', '<', '>'], "_");
    let start = clean(&definition.on.to_string());
    let _ = match style {
        Style::Dot => writeln!(
            text,
            "digraph \"{}\" {{\n  rankdir=LR; node [shape=box, style=\"rounded,filled\", fillcolor=white];\n  on [label=\"{start}\", shape=oval];",
            definition.name
        ),
        Style::Mermaid => writeln!(text, "flowchart LR\n  on([\"{start}\"])"),
    };
    for (n, step) in definition.steps.iter().enumerate() {
        let place = instance.and_then(|instance| instance.steps.get(n)).map(|state| state.place);
        let mut label = format!("{}\n{}", step.name, clean(&step.action));
        for (mark, is) in [("if", step.when.is_some()), ("optional", step.optional), ("final", step.undo.is_none())] {
            if is {
                let _ = write!(label, "\n{mark}");
            }
        }
        if let Some(place) = place {
            let _ = write!(label, "\n{}", word(place));
        }
        let color = place.map(color);
        let _ = match style {
            Style::Dot => {
                let color = color.map_or(String::new(), |color| format!(", fillcolor=\"{color}\""));
                writeln!(text, "  s{n} [label=\"{}\"{color}];", label.replace('\n', "\\n"))
            }
            Style::Mermaid => {
                let color = color.map_or(String::new(), |color| format!("\n  style s{n} fill:{color}"));
                writeln!(text, "  s{n}[\"{}\"]{color}", label.replace('\n', "<br>"))
            }
        };
        let arrow = if style == Style::Dot { "->" } else { "-->" };
        let end = if style == Style::Dot { ";" } else { "" };
        if step.after.is_empty() {
            let _ = writeln!(text, "  on {arrow} s{n}{end}");
        }
        for before in &step.after {
            let _ = writeln!(text, "  s{before} {arrow} s{n}{end}");
        }
    }
    if style == Style::Dot {
        text.push_str("}\n");
    }
    text
}

fn color(place: Place) -> &'static str {
    match place {
        Place::Waiting | Place::Skipped => "#eeeeee",
        Place::Running { .. } | Place::Pausing { .. } | Place::Late => "#fff3b0",
        Place::Done => "#c8e6c9",
        Place::Undoing { .. } | Place::UndoPausing { .. } => "#ffe0b2",
        Place::Undone | Place::Abandoned => "#cfd8dc",
        Place::Failed | Place::Unknown | Place::Stuck { .. } => "#ffcdd2",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use warren_shared::pattern::Pattern;
    use warren_shared::process::{Draft, Fact};

    #[test]
    fn a_picture_shows_every_step_its_way_and_where_it_stands() {
        let draft = |name: &str, after: &[&str]| Draft {
            name: name.into(),
            action: format!("do.{name}"),
            undo: Some(format!("undo.{name}")),
            after: after.iter().map(|name| (*name).to_owned()).collect(),
            ..Draft::default()
        };
        let on = Pattern::parse("order.placed").expect("valid");
        let definition = Definition::new("order", on, vec![draft("a", &[]), draft("b", &["a"])]).expect("valid");
        let mut instance = Instance::new(&definition);
        let _ = instance.take(Fact::Begun, &definition, |_| Some(true), 0.5);
        assert_eq!(
            draw(&definition, None, Style::Mermaid),
            "flowchart LR\n  on([\"order.placed\"])\n  s0[\"a<br>do.a\"]\n  on --> s0\n  s1[\"b<br>do.b\"]\n  s0 --> s1\n"
        );
        let dot = draw(&definition, Some(&instance), Style::Dot);
        assert!(dot.starts_with("digraph \"order\" {\n") && dot.ends_with("}\n"), "{dot}");
        assert!(dot.contains("s0 [label=\"a\\ndo.a\\nrunning\", fillcolor=\"#fff3b0\"]"), "{dot}");
        assert!(dot.contains("s0 -> s1;"), "{dot}");
    }
}

//! Programs that are refused before they run: functions that call themselves with filters.
//!
//! In `def f(g): f(g)` every call holds the arguments of the one before it, which jaq drops one inside the other: a million
//! calls, which take no stack while they run, overflow it when they end. With values (`def f($x): f($x)`) nothing is held.
use jaq_core::load::lex::StrPart;
use jaq_core::load::parse::{BinaryOp, Def, Pattern, Term};
use jaq_core::path::Part;

/// The name of a function that calls itself and takes a filter.
pub(super) fn endless<'s>(term: &Term<&'s str>) -> Option<&'s str> {
    let (mut open, mut found) = (vec![term], None);
    while let Some(term) = open.pop() {
        for def in inside(term, &mut open) {
            let by_filter = def.args.iter().any(|arg| !arg.starts_with('$'));
            if by_filter && calls(&def.body, def.name, def.args.len()) {
                found = Some(def.name);
            }
        }
    }
    found
}

fn calls(body: &Term<&str>, name: &str, arguments: usize) -> bool {
    let mut open = vec![body];
    while let Some(term) = open.pop() {
        if matches!(term, Term::Call(called, with) if *called == name && with.len() == arguments) {
            return true;
        }
        inside(term, &mut open);
    }
    false
}

/// Adds the terms inside a term; returns the definitions in it, whose bodies are added as well.
fn inside<'t, 's>(term: &'t Term<&'s str>, open: &mut Vec<&'t Term<&'s str>>) -> &'t [Def<&'s str>] {
    match term {
        Term::Id | Term::Recurse | Term::Num(_) | Term::Break(_) | Term::Var(_) => {}
        Term::Str(_, parts) => open.extend(parts.iter().filter_map(|part| match part {
            StrPart::Term(term) => Some(term),
            StrPart::Str(_) | StrPart::Char(_) => None,
        })),
        Term::Arr(inner) => open.extend(inner.as_deref()),
        Term::Obj(members) => {
            for (key, value) in members {
                open.push(key);
                open.extend(value);
            }
        }
        Term::Neg(inner) | Term::Label(_, inner) => open.push(inner),
        Term::BinOp(left, op, right) => {
            open.extend([&**left, &**right]);
            if let BinaryOp::Pipe(Some(pattern)) = op {
                keys(pattern, open);
            }
        }
        Term::Fold(_, over, pattern, inner) => {
            open.push(over);
            keys(pattern, open);
            open.extend(inner);
        }
        Term::TryCatch(inner, catch) => {
            open.push(inner);
            open.extend(catch.as_deref());
        }
        Term::IfThenElse(branches, otherwise) => {
            for (condition, then) in branches {
                open.extend([condition, then]);
            }
            open.extend(otherwise.as_deref());
        }
        Term::Def(defs, then) => {
            open.extend(defs.iter().map(|def| &def.body));
            open.push(then);
            return defs;
        }
        Term::Call(_, arguments) => open.extend(arguments),
        Term::Path(of, path) => {
            open.push(of);
            for (part, _) in &path.0 {
                match part {
                    Part::Index(index) => open.push(index),
                    Part::Range(from, to) => open.extend(from.iter().chain(to)),
                }
            }
        }
    }
    &[]
}

fn keys<'t, 's>(pattern: &'t Pattern<&'s str>, open: &mut Vec<&'t Term<&'s str>>) {
    match pattern {
        Pattern::Var(_) => {}
        Pattern::Arr(inner) => inner.iter().for_each(|pattern| keys(pattern, open)),
        Pattern::Obj(members) => {
            for (key, pattern) in members {
                open.push(key);
                keys(pattern, open);
            }
        }
    }
}

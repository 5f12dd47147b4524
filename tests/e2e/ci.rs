//! What `.ci/run` makes of a version of the broker that cannot be had, and of a stage that fails. The stages are stand-ins: a program
//! that notes how it was called, and fails where it is told to.
use anyhow::{Context, ensure};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use warren_tests::broker::{root, scratch};

/// Runs it with stand-ins that fail where their call holds this text; returns the exit code, the calls and what was said.
fn ci(name: &str, fails: &str, allows_missing: &str) -> anyhow::Result<(i32, String, String)> {
    let dir = scratch().join(name);
    std::fs::remove_dir_all(&dir).ok();
    let program = |path: &Path, text: &str| -> anyhow::Result<()> {
        std::fs::create_dir_all(path.parent().context("a directory")?)?;
        std::fs::write(path, text)?;
        Ok(std::fs::set_permissions(path, PermissionsExt::from_mode(0o755))?)
    };
    let calls = dir.join("calls");
    let stand_in = format!(
        "#!/bin/sh\ncall=\"${{0##*/}} $*\"\necho \"$call\" >>'{}'\ncase \"$call\" in *'{fails}'*) exit 1 ;; esac\n",
        calls.display()
    );
    for script in ["bin/make", "scripts/rabbitmq", "scripts/test", "scripts/check-deploy"] {
        program(&dir.join(script), &stand_in)?;
    }
    for real in [".ci/run", "scripts/lib/stages"] {
        program(&dir.join(real), &std::fs::read_to_string(root().join(real))?)?;
    }
    let path = format!("{}:{}", dir.join("bin").display(), std::env::var("PATH")?);
    let output = Command::new(dir.join(".ci/run"))
        .env("PATH", path)
        .env("WARREN_CI_ALLOW_MISSING_BROKER", allows_missing)
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    Ok((output.status.code().context("it was not killed")?, std::fs::read_to_string(calls)?, said))
}

#[test]
fn a_version_of_the_broker_that_cannot_be_had_fails_ci_unless_that_is_accepted() -> anyhow::Result<()> {
    let (code, calls, said) = ci("ci-whole", "nothing fails", "")?;
    ensure!(code == 0 && calls.contains("cluster::") && calls.contains("make bench"), "{code}: {calls}{said}");
    let missing = "rabbitmq get --version 4.3";
    let (code, calls, said) = ci("ci-missing", missing, "")?;
    ensure!(code == 69 && said.contains("4.3 CANNOT BE HAD") && !calls.contains("make bench"), "{code}: {calls}{said}");
    let (code, calls, said) = ci("ci-accepted", missing, "1")?;
    ensure!(code == 0 && said.contains("4.3 CANNOT BE HAD") && calls.contains("make bench"), "{code}: {calls}{said}");
    ensure!(!calls.contains("cluster::"), "its tests did not run: {calls}");
    Ok(())
}

#[test]
fn a_stage_that_fails_ends_ci_and_the_table_is_printed_all_the_same() -> anyhow::Result<()> {
    let (code, calls, said) = ci("ci-fails", "make test", "")?;
    ensure!(code == 1 && !calls.contains("check-deploy"), "{code}: {calls}{said}");
    ensure!(said.contains("make test: exit 1") && said.contains(" all"), "{said}");
    Ok(())
}

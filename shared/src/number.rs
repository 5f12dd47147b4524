//! Numbers as they are written in JSON, compared by their value and without losing a digit.

/// Zeros that are written out; what has more gets an exponent.
const ZEROS: i64 = 64;

/// The one spelling of a JSON number's value: `1`, `1.0`, `10e-1` are all `1`. None where the text is no number.
#[must_use]
pub fn canonical(text: &str) -> Option<String> {
    let (sign, rest) = text.strip_prefix('-').map_or(("", text), |rest| ("-", rest));
    let (mantissa, exponent) = match rest.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, exponent.parse::<i64>().ok()?),
        None => (rest, 0),
    };
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, "0"));
    let is_digits = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    if !is_digits(whole) || !is_digits(fraction) {
        return None;
    }
    let all = format!("{whole}{fraction}");
    let digits = all.trim_end_matches('0');
    let dropped = i64::try_from(all.len() - digits.len()).ok()?;
    let exponent = exponent.checked_sub(i64::try_from(fraction.len()).ok()?)?.checked_add(dropped)?;
    let digits = digits.trim_start_matches('0');
    if digits.is_empty() {
        return Some("0".into());
    }
    let zeros = |count: i64| "0".repeat(usize::try_from(count).unwrap_or_default());
    // How many digits stand before the point.
    let before = i64::try_from(digits.len()).ok()?.checked_add(exponent)?;
    Some(if (0..=ZEROS).contains(&exponent) {
        format!("{sign}{digits}{}", zeros(exponent))
    } else if exponent > 0 || before < -ZEROS {
        format!("{sign}{digits}e{exponent}")
    } else if before <= 0 {
        format!("{sign}0.{}{digits}", zeros(-before))
    } else {
        let (whole, fraction) = digits.split_at(usize::try_from(before).ok()?);
        format!("{sign}{whole}.{fraction}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_value_has_one_spelling_with_all_its_digits() {
        for (spellings, wanted) in [
            (&["1", "1.0", "1.000", "10e-1", "0.1e1", "1E0", "1e+0", "01"][..], "1"),
            (&["0", "-0", "0.0", "0e99", "-0.0e-5"], "0"),
            (&["1.10", "1.1", "11e-1", "0.11E+1"], "1.1"),
            (&["-12.50"], "-12.5"),
            (
                &["12345678901234567890123", "12345678901234567890123.0", "1.2345678901234567890123e22"],
                "12345678901234567890123",
            ),
            (&["12345678901234567.89"], "12345678901234567.89"),
            (&["100", "1e2"], "100"),
            (&["0.001", "1e-3"], "0.001"),
            (&["1e400", "10e399"], "1e400"),
            (&["1e-400", "0.1e-399"], "1e-400"),
        ] {
            for spelling in spellings {
                assert_eq!(canonical(spelling).as_deref(), Some(wanted), "{spelling}");
            }
        }
        for text in
            ["", "-", "1.", ".5", "1e", "e1", "+1", " 1", "0x1", "NaN", "1e99999999999999999999", "--1", "1_0", "١"]
        {
            assert_eq!(canonical(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn the_spelling_is_the_same_value_and_its_own(digits in "[0-9]{1,15}", fraction in "[0-9]{1,10}", exponent in -90..90_i32) {
            let text = format!("-{digits}.{fraction}e{exponent}");
            let canonical = canonical(&text).expect("a number");
            let again = super::canonical(&canonical);
            prop_assert_eq!(again.as_deref(), Some(&*canonical));
            let (a, b): (f64, f64) = (text.parse().expect("a number"), canonical.parse().expect("a number"));
            prop_assert!(a == b, "{} is not {}", text, canonical);
        }
    }
}

//! Kubernetes' notation of quantities of bytes: `512Mi`, `1.5G`, `1e9`, `268435456`.

/// Why a text is no quantity of bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    /// Not of the form number, optional fraction, suffix.
    #[error("`{0}` is no quantity: write a number with a suffix, such as 512Mi or 2Gi")]
    Form(String),
    /// The suffix is none, or one of parts of a byte (n, u, m).
    #[error(
        "`{0}` has an unknown suffix: Ki, Mi, Gi, Ti, Pi, Ei are powers of 1024, k, M, G, T, P, E powers of 1000"
    )]
    Suffix(String),
    /// More than 2⁶³ − 1 bytes.
    #[error("`{0}` is more than eight exbibytes")]
    TooLarge(String),
}

/// Most digits of a number; Kubernetes rounds beyond its own limit, we refuse.
const MAX_DIGITS: usize = 24;

/// Bytes of a quantity; parts of a byte round up, as in Kubernetes.
///
/// # Errors
/// See [`QuantityError`].
pub fn parse_bytes(text: &str) -> Result<u64, QuantityError> {
    let form = || QuantityError::Form(text.to_owned());
    let number_ends = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(number_ends);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = format!("{whole}{fraction}");
    if digits.is_empty() || fraction.contains('.') || digits.len() > MAX_DIGITS {
        return Err(form());
    }
    let mantissa: u128 = digits.parse().map_err(|_| form())?;
    let factor = factor(suffix).ok_or_else(|| QuantityError::Suffix(text.to_owned()))?;
    let large = || QuantityError::TooLarge(text.to_owned());
    let scale = 10_u128.checked_pow(u32::try_from(fraction.len()).map_err(|_| form())?);
    let bytes = mantissa
        .checked_mul(factor)
        .ok_or_else(large)?
        .div_ceil(scale.ok_or_else(form)?);
    u64::try_from(bytes)
        .ok()
        .filter(|bytes| i64::try_from(*bytes).is_ok())
        .ok_or_else(large)
}

/// Thousandths of a quantity, which may count parts of a whole (`500m`); what is smaller rounds up.
///
/// # Errors
/// See [`QuantityError`].
pub fn parse_milli(text: &str) -> Result<u128, QuantityError> {
    match text.strip_suffix('m') {
        Some(number) if number.bytes().all(|b| b.is_ascii_digit() || b == b'.') => {
            parse_bytes(number).map(u128::from)
        }
        _ => parse_bytes(text).map(|whole| u128::from(whole) * 1000),
    }
}

fn factor(suffix: &str) -> Option<u128> {
    let power = |base: u128, exponent| base.checked_pow(exponent);
    match suffix {
        "" => Some(1),
        "Ki" => power(1024, 1),
        "Mi" => power(1024, 2),
        "Gi" => power(1024, 3),
        "Ti" => power(1024, 4),
        "Pi" => power(1024, 5),
        "Ei" => power(1024, 6),
        "k" => power(1000, 1),
        "M" => power(1000, 2),
        "G" => power(1000, 3),
        "T" => power(1000, 4),
        "P" => power(1000, 5),
        "E" => power(1000, 6),
        _ => {
            let exponent = suffix.strip_prefix(['e', 'E'])?;
            let exponent = exponent.strip_prefix('+').unwrap_or(exponent);
            if !exponent.bytes().all(|b| b.is_ascii_digit()) {
                return None;
            }
            power(10, exponent.parse().ok().filter(|e| *e <= 18)?)
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn known_quantities() {
        for (text, bytes) in [
            ("512Mi", 512 << 20),
            ("2Gi", 2 << 30),
            ("1.5Ki", 1536),
            ("0.1Ki", 103),
            ("128974848", 128_974_848),
            ("129e6", 129_000_000),
            ("129M", 129_000_000),
            ("1E", 1_000_000_000_000_000_000),
            ("7Ei", 7 << 60),
            ("0", 0),
            ("1.", 1),
            (".5k", 500),
        ] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn thousandths() {
        for (text, milli) in [("500m", 500), ("2", 2000), ("1Ki", 1_024_000), ("1.", 1000)] {
            assert_eq!(parse_milli(text), Ok(milli), "{text}");
        }
        assert!(parse_milli("m").is_err() && parse_milli("1mm").is_err());
    }

    #[test]
    fn what_is_none_says_so() {
        for text in ["", "Mi", "-1Mi", "1.2.3", "1 Mi", "٣Mi", &"1".repeat(30)] {
            let error = parse_bytes(text).unwrap_err();
            assert!(
                matches!(error, QuantityError::Form(_) | QuantityError::Suffix(_)),
                "{text}: {error}"
            );
        }
        for text in ["1mi", "1MiB", "100m", "1e-3", "1e999", "1KI"] {
            assert!(
                matches!(parse_bytes(text), Err(QuantityError::Suffix(_))),
                "{text}"
            );
        }
        for text in ["8Ei", "99999999999999999999Ei", "10E"] {
            assert!(
                matches!(parse_bytes(text), Err(QuantityError::TooLarge(_))),
                "{text}"
            );
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "\\PC{0,12}") {
            let _answer = parse_bytes(&text);
        }

        #[test]
        fn mebibytes_are_what_they_are(n in 0_u64..1 << 40) {
            prop_assert_eq!(parse_bytes(&format!("{n}Mi")).ok(), Some(n << 20).filter(|b| *b <= i64::MAX as u64));
        }
    }
}

//! `strftime_now` for templates: UTC, the directives that templates use.

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = [
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
];

/// Formats `unix` seconds. An unknown directive is an error: a silent gap would change the prompt.
pub(super) fn strftime(format: &str, unix: u64) -> Result<String, String> {
    let days = unix / 86_400;
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (unix / 3600 % 24, unix / 60 % 60, unix % 60);
    let weekday = DAYS[((days + 4) % 7) as usize];
    let name = MONTHS[(month - 1) as usize];
    let mut out = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            out.push(character);
            continue;
        }
        let mut directive = characters.next().unwrap_or('%');
        let padded = directive != '-';
        if !padded {
            directive = characters.next().unwrap_or('%');
        }
        let two = |value: u64| {
            if padded {
                format!("{value:02}")
            } else {
                value.to_string()
            }
        };
        match directive {
            'Y' => out.push_str(&year.to_string()),
            'y' => out.push_str(&two(year % 100)),
            'm' => out.push_str(&two(month)),
            'd' => out.push_str(&two(day)),
            'H' => out.push_str(&two(hour)),
            'I' => out.push_str(&two((hour + 11) % 12 + 1)),
            'M' => out.push_str(&two(minute)),
            'S' => out.push_str(&two(second)),
            'p' => out.push_str(if hour < 12 { "AM" } else { "PM" }),
            'B' => out.push_str(name),
            'b' => out.push_str(&name[..3]),
            'A' => out.push_str(weekday),
            'a' => out.push_str(&weekday[..3]),
            'F' => out.push_str(&format!("{year}-{month:02}-{day:02}")),
            'T' => out.push_str(&format!("{hour:02}:{minute:02}:{second:02}")),
            '%' => out.push('%'),
            other => return Err(format!("strftime_now does not know %{other}")),
        }
    }
    Ok(out)
}

/// Days since 1970 → (year, month, day) of the Gregorian calendar.
/// Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", `civil_from_days`.
fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let of_era = shifted % 146_097;
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_dates() {
        assert_eq!(strftime("%d %B %Y", 0).unwrap(), "01 January 1970");
        assert_eq!(
            strftime("%A %-d %b %Y %H:%M:%S %I%p", 1_709_210_096).unwrap(),
            "Thursday 29 Feb 2024 12:34:56 12PM"
        );
        assert!(strftime("%Q", 0).is_err());
    }
}

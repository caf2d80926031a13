//! Numbers as people read them.

use foregate_api::ids::Rank;

/// `1.5 MiB`.
pub(crate) fn bytes(of: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut value, mut unit) = (of as f64, 0);
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{of} B")
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// `3 min`, of a time that has passed.
pub(crate) fn ago(at_ms: u64, now_ms: u64) -> String {
    let seconds = now_ms.saturating_sub(at_ms) / 1000;
    match seconds {
        0..=119 => format!("{seconds} s ago"),
        120..=7199 => format!("{} min ago", seconds / 60),
        7200..=172_799 => format!("{} h ago", seconds / 3600),
        _ => format!("{} days ago", seconds / 86_400),
    }
}

/// `0, 2 and 3`.
pub(crate) fn list<T: std::fmt::Display>(of: &[T]) -> String {
    let words: Vec<String> = of.iter().map(ToString::to_string).collect();
    match words.as_slice() {
        [] => "none".to_owned(),
        [one] => one.clone(),
        [most @ .., last] => format!("{} and {last}", most.join(", ")),
    }
}

/// `rank 2` or `ranks 0 and 2`.
pub(crate) fn ranks(of: &[Rank]) -> String {
    match of {
        [one] => format!("rank {one}"),
        _ => format!("ranks {}", list(of)),
    }
}

/// `1 copy` or `3 copies`.
pub(crate) fn copies(n: usize) -> String {
    match n {
        1 => "1 copy".to_owned(),
        _ => format!("{n} copies"),
    }
}

/// A measured figure, or that there is none.
pub(crate) fn or_unknown(figure: Option<String>) -> String {
    figure.unwrap_or_else(|| "not measured".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_as_meant() {
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(u64::MAX), "16777216.0 TiB");
        assert_eq!(ago(5_000, 1_000), "0 s ago");
        assert_eq!(ago(0, 180_000), "3 min ago");
        assert_eq!(list(&[1, 2, 3]), "1, 2 and 3");
        assert_eq!(ranks(&[Rank(4)]), "rank 4");
    }
}

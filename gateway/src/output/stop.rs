//! Stop strings over a text that comes in pieces. A piece's end that may begin a stop string waits.

/// What a piece gave.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Found {
    /// Text that may be sent.
    pub text: String,
    /// The stop string that was found; nothing follows it.
    pub stopped_by: Option<String>,
}

/// Looks for the first of several stop strings.
#[derive(Debug, Clone)]
pub struct StopScanner {
    stops: Vec<String>,
    include: bool,
    /// Text not sent yet: a proper prefix of some stop string.
    held: String,
}

impl StopScanner {
    /// Looks for `stops`, none of which is empty. `include`: the stop string is sent too.
    #[must_use]
    pub fn new(stops: &[String], include: bool) -> Self {
        Self {
            stops: stops.to_vec(),
            include,
            held: String::new(),
        }
    }

    /// Takes the next piece. After a find, the scanner is done.
    pub fn push(&mut self, piece: &str) -> Found {
        if self.stops.is_empty() {
            return Found {
                text: piece.to_owned(),
                stopped_by: None,
            };
        }
        self.held.push_str(piece);
        // The find that ends first wins: it is the one a reader of single characters would see.
        let first = self
            .stops
            .iter()
            .filter_map(|stop| {
                let start = self.held.find(stop.as_str())?;
                Some((start + stop.len(), start, stop))
            })
            .min_by_key(|(end, start, _)| (*end, *start));
        if let Some((end, start, stop)) = first {
            let stopped_by = Some(stop.clone());
            let upto = if self.include { end } else { start };
            let text = self.held[..upto].to_owned();
            self.held.clear();
            return Found { text, stopped_by };
        }
        let keep = self.waiting();
        let text = self.held[..keep].to_owned();
        self.held.drain(..keep);
        Found {
            text,
            stopped_by: None,
        }
    }

    /// Where the longest end of the held text begins that begins a stop string.
    fn waiting(&self) -> usize {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let from = self.held.len().saturating_sub(longest.saturating_sub(1));
        (from..self.held.len())
            .filter(|at| self.held.is_char_boundary(*at))
            .find(|at| {
                let tail = &self.held[*at..];
                self.stops.iter().any(|stop| stop.starts_with(tail))
            })
            .unwrap_or(self.held.len())
    }

    /// The end: what waited was no stop string.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(pieces: &[&str], stops: &[&str], include: bool) -> (String, Option<String>) {
        let stops: Vec<String> = stops.iter().map(|stop| (*stop).to_owned()).collect();
        let mut scanner = StopScanner::new(&stops, include);
        let mut text = String::new();
        for piece in pieces {
            let found = scanner.push(piece);
            text.push_str(&found.text);
            if found.stopped_by.is_some() {
                return (text, found.stopped_by);
            }
        }
        text.push_str(&scanner.finish());
        (text, None)
    }

    #[test]
    fn a_prefix_waits_and_is_released() {
        let mut scanner = StopScanner::new(&["END".to_owned()], false);
        assert_eq!(scanner.push("ab E").text, "ab ");
        assert_eq!(scanner.push("N").text, "");
        assert_eq!(scanner.push("d").text, "ENd");
    }

    #[test]
    fn stops_over_borders_and_the_first_one_wins() {
        assert_eq!(
            run(&["a#", "#", "b"], &["##"], false),
            ("a".into(), Some("##".into()))
        );
        assert_eq!(
            run(&["a#", "#b"], &["##"], true),
            ("a##".into(), Some("##".into()))
        );
        assert_eq!(
            run(&["xyz"], &["z", "xy"], false),
            (String::new(), Some("xy".into()))
        );
        assert_eq!(
            run(&["né", "e"], &["ée"], false),
            ("n".into(), Some("ée".into()))
        );
    }

    proptest! {
        /// Piece by piece gives the same as reading one character at a time.
        #[test]
        fn borders_do_not_matter(
            text in "[ab]{0,24}",
            stops in prop::collection::vec("[ab]{1,4}", 1..3),
            cuts in prop::collection::vec(0_usize..24, 0..6),
        ) {
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let singles: Vec<&str> = text.split("").filter(|part| !part.is_empty()).collect();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(text.len())).collect();
            cuts.extend([0, text.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&str> = cuts.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect();
            prop_assert_eq!(run(&pieces, &stops, false).0, run(&singles, &stops, false).0);
        }
    }
}

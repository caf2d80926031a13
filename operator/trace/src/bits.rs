//! Numbers of a trace: seven bits a byte, lowest first; counts as runs of zeroes and what follows them.

/// Appends a number.
pub(super) fn put_varint(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

/// Appends counts: (zeroes, the count after them) until all are told; zeroes at the end stand alone.
pub(super) fn put_counts(out: &mut Vec<u8>, counts: &[u64]) {
    let mut zeroes = 0;
    for count in counts {
        if *count == 0 {
            zeroes += 1;
            continue;
        }
        put_varint(out, zeroes);
        put_varint(out, *count);
        zeroes = 0;
    }
    if zeroes > 0 {
        put_varint(out, zeroes);
    }
}

/// Bytes that are read from the front.
#[derive(Debug)]
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
}

impl<'a> Cursor<'a> {
    pub(super) const fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub(super) const fn len(&self) -> usize {
        self.bytes.len()
    }

    /// The next number.
    pub(super) fn varint(&mut self) -> Result<u64, &'static str> {
        let mut number = 0_u64;
        for shift in (0..64).step_by(7) {
            let (byte, rest) = self.bytes.split_first().ok_or("it ends too early")?;
            self.bytes = rest;
            let part = u64::from(byte & 0x7f);
            if shift == 63 && part > 1 {
                break;
            }
            number |= part << shift;
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err("a number has too many bits")
    }
}

/// The next `pairs` counts.
pub(super) fn counts(from: &mut Cursor<'_>, pairs: usize) -> Result<Vec<u64>, &'static str> {
    let mut counts = vec![0; pairs];
    let mut at = 0_usize;
    while at < pairs {
        let zeroes = usize::try_from(from.varint()?).unwrap_or(usize::MAX);
        at = at.saturating_add(zeroes);
        if at == pairs {
            break;
        }
        let Some(count) = counts.get_mut(at) else {
            return Err("it counts more experts than there are");
        };
        *count = from.varint()?;
        at += 1;
    }
    Ok(counts)
}

//! The authority of one cluster, and what it has issued: when each is made, renewed and trusted. Pure.
//!
//! ```text
//!  authority   |------------ current ------------|
//!                              |- next: trusted -|------------ current ------------|
//!                                                 |- before: trusted -|
//!  role                    |--- from current ---| ... renewed at two thirds of its life
//! ```
//!
//! A new authority is trusted by everybody for [`OVERLAP`] before it issues anything, and the one before stays trusted until
//! it ends, which none of its certificates outlives. So at no moment does anybody meet a certificate that it does not
//! trust yet, or not any more. Times are in seconds since 1970.

use foregate_api::tls::TlsRole;
use foregate_tls::authority::{Authority, IssueError, Issued, Validity, validity, vouches};

const DAY: u64 = 24 * 60 * 60;
/// Life of an authority. Renewed when a third of it is left, so that it outlives whatever it issued before.
const AUTHORITY_LIFE: u64 = 365 * DAY;
/// Life of a role's certificate. Renewed when a third of it is left.
const ROLE_LIFE: u64 = 90 * DAY;
/// How long an authority is trusted before it issues. Kubelets bring a changed Secret to pods within minutes.
const OVERLAP: u64 = DAY;
/// Certificates are valid from a little before they are made, for clocks that are late.
const SKEW: u64 = 5 * 60;

/// The authority of a cluster as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Kept {
    /// Who issues.
    pub(crate) current: Issued,
    /// Who will issue; trusted already.
    pub(crate) next: Option<Issued>,
    /// Certificate of who issued before; trusted still.
    pub(crate) before: Option<String>,
}

/// What a role has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RoleKeys {
    pub(crate) issued: Issued,
    /// Whom the role trusts.
    pub(crate) trusted: String,
}

impl Kept {
    /// Certificates of all authorities that are trusted.
    pub(crate) fn trusted(&self) -> String {
        let next = self.next.as_ref().map(|next| &next.cert);
        let all = [Some(&self.current.cert), next, self.before.as_ref()];
        let all = all.into_iter().flatten().map(|cert| cert.trim_end());
        all.map(|cert| format!("{cert}\n")).collect()
    }

    fn issuing(current: Issued) -> Self {
        Self {
            current,
            next: None,
            before: None,
        }
    }
}

/// The authority as it should be now; `kept` is what is stored.
///
/// # Errors
/// When what is stored is no authority, or nothing can be made.
pub(crate) fn authority(
    kept: Option<&Kept>,
    domain: &str,
    now: u64,
) -> Result<Kept, IssueError> {
    let create = || {
        Authority::create(
            &format!("foregate authority of {domain}"),
            from(now, AUTHORITY_LIFE),
        )
    };
    let Some(kept) = kept else {
        return Ok(Kept::issuing(create()?));
    };
    let mut kept = kept.clone();
    if let Some(before) = &kept.before
        && validity(before)?.until < now
    {
        kept.before = None;
    }
    let left = validity(&kept.current.cert)?.until.saturating_sub(now);
    if left == 0 {
        // Nothing that it issued is valid any more, so there is nobody to wait for.
        let current = kept.next.take().map_or_else(create, Ok)?;
        return Ok(Kept::issuing(current));
    }
    match &kept.next {
        None if left < AUTHORITY_LIFE / 3 => kept.next = Some(create()?),
        None => {}
        Some(next) if validity(&next.cert)?.from + SKEW + OVERLAP <= now => {
            let next = next.clone();
            kept.before = Some(std::mem::replace(&mut kept.current, next).cert);
            kept.next = None;
        }
        Some(_) => {}
    }
    Ok(kept)
}

/// What a role should have now; `there` is what it has.
///
/// # Errors
/// When the authority is none, or nothing can be made.
pub(crate) fn role(
    kept: &Kept,
    role: TlsRole,
    there: Option<&RoleKeys>,
    domain: &str,
    now: u64,
) -> Result<RoleKeys, IssueError> {
    let trusted = kept.trusted();
    let most = validity(&kept.current.cert)?.until;
    let wanted = from(now, ROLE_LIFE);
    let wanted = Validity {
        until: wanted.until.min(most),
        ..wanted
    };
    if let Some(there) = there
        && vouches(&trusted, &there.issued, &role.name(domain), now)
        && validity(&there.issued.cert).is_ok_and(|has| stays(has, wanted, now))
    {
        return Ok(RoleKeys {
            issued: there.issued.clone(),
            trusted,
        });
    }
    let issued = Authority::open(&kept.current)?.role(role, domain, wanted)?;
    Ok(RoleKeys { issued, trusted })
}

/// Whether a certificate is not to be renewed yet. One of an authority that ends soon cannot be bettered.
const fn stays(has: Validity, wanted: Validity, now: u64) -> bool {
    has.until.saturating_sub(now) > ROLE_LIFE / 3 || has.until + DAY > wanted.until
}

const fn from(now: u64, life: u64) -> Validity {
    Validity {
        from: now.saturating_sub(SKEW),
        until: now + life,
    }
}

#[cfg(test)]
mod tests;

use super::*;

const DOMAIN: &str = "tiny.default.foregate.internal";
const START: u64 = 1_700_000_000;

/// A cluster's Secrets, and an operator that looks at them now and then.
struct World {
    now: u64,
    kept: Option<Kept>,
    roles: [Option<RoleKeys>; 2],
    /// Authorities that were made, and certificates that roles were given.
    made: (usize, usize),
}

impl World {
    fn new() -> Self {
        let mut world = Self {
            now: START,
            kept: None,
            roles: [None, None],
            made: (0, 0),
        };
        world.look();
        world
    }

    fn look(&mut self) {
        let kept = authority(self.kept.as_ref(), DOMAIN, self.now).unwrap();
        let issuers = |kept: &Kept| [Some(kept.current.clone()), kept.next.clone()];
        let known = self.kept.as_ref().map(issuers).unwrap_or_default();
        self.made.0 += issuers(&kept)
            .iter()
            .flatten()
            .filter(|issuer| !known.iter().flatten().any(|known| known == *issuer))
            .count();
        for (at, who) in TlsRole::ALL.into_iter().enumerate() {
            let had = self.roles[at].as_ref();
            let has = role(&kept, who, had, DOMAIN, self.now).unwrap();
            if had.is_none_or(|had| had.issued != has.issued) {
                self.made.1 += 1;
            }
            self.roles[at] = Some(has);
        }
        self.kept = Some(kept);
    }

    fn keys(&self, at: usize) -> &RoleKeys {
        self.roles[at].as_ref().unwrap()
    }
}

/// Whether `one` is believed by who trusts `trusted`.
fn believed(trusted: &str, one: &Issued, who: TlsRole, now: u64) -> bool {
    vouches(trusted, one, &who.name(DOMAIN), now)
}

#[test]
fn to_look_twice_is_to_look_once() {
    let mut world = World::new();
    let (kept, roles) = (world.kept.clone(), world.roles.clone());
    for _ in 0..3 {
        world.now += 60;
        world.look();
    }
    assert_eq!((world.kept, world.roles), (kept, roles));
    assert_eq!(world.made, (1, 2));
}

/// Three years, looked at every half a day. Pods have the files of now or those of the look before: whoever has either
/// believes whoever has either.
#[test]
fn everybody_is_believed_by_everybody_across_all_renewals() {
    let mut world = World::new();
    for _ in 0..(3 * 365 * 2) {
        let before = world.roles.clone();
        world.now += DAY / 2;
        world.look();
        let looks = [&before, &world.roles];
        for trusting in looks {
            let trusted = &trusting[0].as_ref().unwrap().trusted;
            for shown in looks {
                for (at, who) in TlsRole::ALL.into_iter().enumerate() {
                    let issued = &shown[at].as_ref().unwrap().issued;
                    assert!(
                        believed(trusted, issued, who, world.now),
                        "at {}",
                        world.now
                    );
                }
            }
        }
    }
    let (authorities, certificates) = world.made;
    assert!((4..=6).contains(&authorities), "{authorities} authorities");
    assert!(
        (34..=42).contains(&certificates),
        "{certificates} certificates"
    );
}

#[test]
fn an_operator_that_was_away_for_years_begins_anew() {
    let mut world = World::new();
    let first = world.keys(0).clone();
    world.now += 3 * AUTHORITY_LIFE;
    world.look();
    for (at, who) in TlsRole::ALL.into_iter().enumerate() {
        let has = world.keys(at);
        assert!(believed(&has.trusted, &has.issued, who, world.now));
    }
    assert!(!believed(
        &world.keys(0).trusted,
        &first.issued,
        TlsRole::Gateway,
        START
    ));
}

#[test]
fn what_is_broken_or_of_others_is_issued_again() {
    let world = World::new();
    let kept = world.kept.clone().unwrap();
    let (gateway, worker) = (world.keys(0), world.keys(1));
    let elsewhere = World::new();
    let mixed = RoleKeys {
        issued: Issued {
            cert: worker.issued.cert.clone(),
            key: gateway.issued.key.clone(),
        },
        ..worker.clone()
    };
    let empty = RoleKeys {
        issued: Issued {
            cert: String::new(),
            key: String::new(),
        },
        ..worker.clone()
    };
    for there in [&mixed, &empty, gateway, elsewhere.keys(1)] {
        let has = role(&kept, TlsRole::Worker, Some(there), DOMAIN, START).unwrap();
        assert_ne!(has.issued, there.issued);
        assert!(believed(&has.trusted, &has.issued, TlsRole::Worker, START));
    }
    // Who only trusts the wrong ones keeps its certificate.
    let there = RoleKeys {
        trusted: String::new(),
        ..worker.clone()
    };
    let has = role(&kept, TlsRole::Worker, Some(&there), DOMAIN, START).unwrap();
    assert_eq!(&has, worker);
}

/// An authority of somebody else's may end before a certificate would: then that is its end, and it is not renewed again
/// and again.
#[test]
fn certificates_end_with_their_authority() {
    let short = Validity {
        from: START,
        until: START + 20 * DAY,
    };
    let kept = Kept::issuing(Authority::create("ours", short).unwrap());
    let has = role(&kept, TlsRole::Worker, None, DOMAIN, START).unwrap();
    assert_eq!(validity(&has.issued.cert).unwrap().until, short.until);
    let later = role(&kept, TlsRole::Worker, Some(&has), DOMAIN, START + DAY).unwrap();
    assert_eq!(later, has);
}

//! What stands before a worker runs: configuration checked, weights mapped and packed.

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;

use foregate_api::cpu::{CpuPath, Pinning, Seat};
use foregate_api::node::{Device as Class, FabricKind, WorkerConfig};
use foregate_checkpoint::Checkpoint;
use foregate_kernels::{
    Comms, Cpu, Keep, KvCache, KvShape, Ops as _, PathError, SeatError, Seats, Share,
};
use foregate_models::Model;
use foregate_tls::Keys;

use crate::dense::DenseWeights;
use crate::device::{Cards, Device};
use crate::error::WorkerError;
use crate::exchange::Way;
use crate::fabric::local::LocalHub;
use crate::fabric::tcp::TcpSettings;
use crate::loading::Loading;

/// A model in memory, without its experts.
pub(crate) struct Loaded {
    pub(crate) checkpoint: Arc<Checkpoint>,
    pub(crate) device: Device,
    /// What sequences need; none in a worker that holds experts only.
    pub(crate) attention: Option<Attention>,
    /// Bytes of the dense weights in memory.
    pub(crate) dense_bytes: u64,
    /// What carries rows between cards, where they travel in lock-step.
    pub(crate) comms: Option<Arc<dyn Comms>>,
}

/// All weights that are no expert's, and room for keys and values.
pub(crate) struct Attention {
    pub(crate) model: Model,
    pub(crate) kv: KvCache,
    pub(crate) shape: KvShape,
}

/// Refuses what no worker can run with, naming the field.
pub(crate) fn check(config: &WorkerConfig) -> Result<(), WorkerError> {
    // A node file may be written by hand; queues and threads are made as large as it says.
    let ranges = [
        ("threads", u64::from(config.threads), 1..=1024),
        ("max_num_seqs", u64::from(config.max_num_seqs), 1..=4096),
        (
            "max_num_batched_tokens",
            u64::from(config.max_num_batched_tokens),
            1..=65_536,
        ),
        ("max_waiting", u64::from(config.max_waiting), 0..=65_536),
        ("overtake_ms", config.overtake_ms, 0..=60_000),
        (
            "max_model_len",
            u64::from(config.max_model_len),
            1..=u64::from(u32::MAX),
        ),
        ("page_tokens", u64::from(config.page_tokens), 1..=256),
        (
            "exchange_deadline_ms",
            config.exchange_deadline_ms,
            1..=600_000,
        ),
        ("window_ms", config.window_ms, 1..=600_000),
    ];
    for (field, value, range) in ranges {
        if !range.contains(&value) {
            let (least, most) = (range.start(), range.end());
            let what = format!("{value}, must be from {least} to {most}");
            return Err(refuse(field, &what));
        }
    }
    if config.duty.holds_experts() != (config.slots > 0) {
        let what = format!("{}, for a worker of duty {:?}", config.slots, config.duty);
        return Err(refuse("slots", &what));
    }
    if config.served_name.is_empty() {
        return Err(refuse("served_name", "must name the model"));
    }
    if config.fabric == FabricKind::Nccl {
        lock_step(config)?;
    }
    Ok(())
}

/// What a worker must be to exchange rows over NCCL.
fn lock_step(config: &WorkerConfig) -> Result<(), WorkerError> {
    if config.device == Class::Cpu {
        return Err(refuse(
            "fabric",
            "`nccl` carries rows between cards, and `device` is `cpu`: name a card there, or use `tcp`",
        ));
    }
    if !config.duty.holds_experts() {
        return Err(refuse(
            "duty",
            "`attention`, without expert slots, is in no placement, and so in no group of the fabric `nccl`: use `both`, \
             or the fabric `tcp`",
        ));
    }
    Ok(())
}

/// The fabric that the configuration names, from what the composition root gave.
pub(crate) fn way(
    config: &WorkerConfig,
    hub: Option<Arc<LocalHub>>,
    listener: Option<TcpListener>,
    keys: Option<Keys>,
) -> Result<Way, WorkerError> {
    match config.fabric {
        FabricKind::Local => hub.map(Way::Local).ok_or_else(|| {
            refuse(
                "fabric",
                "`local` needs all workers in one process; use `tcp`",
            )
        }),
        FabricKind::Tcp => {
            let listener = listener
                .ok_or_else(|| refuse("exchange_listen", "the TCP fabric needs a listener"))?;
            let address = listener.local_addr().map_err(|source| WorkerError::Io {
                what: "exchange_listen",
                source,
            })?;
            reachable("exchange_listen", address)?;
            Ok(Way::Tcp(listener, TcpSettings::default(), keys))
        }
        // NCCL knows neither keys nor encryption.
        FabricKind::Nccl if keys.is_some() => Err(refuse(
            "fabric",
            "`nccl` would carry rows in the clear, from whoever comes, and the node file has `tls`: use `tcp`, or leave \
             `tls` out where the network is trusted",
        )),
        FabricKind::Nccl => Ok(Way::LockStep),
    }
}

/// What carries rows between cards, where the configuration wants it.
fn comms(config: &WorkerConfig, cards: &Cards) -> Result<Option<Arc<dyn Comms>>, WorkerError> {
    let (FabricKind::Nccl, Class::Cuda { card }) = (config.fabric, config.device) else {
        return Ok(None);
    };
    let comms = cards.comms(card);
    comms
        .map(Some)
        .map_err(|why| refuse("fabric", &format!("`nccl`: {why}; or use `tcp`")))
}

/// The address as peers are told it.
pub(crate) fn reachable(
    field: &'static str,
    address: SocketAddr,
) -> Result<String, WorkerError> {
    if address.ip().is_unspecified() {
        return Err(refuse(
            field,
            &format!("{address} cannot be told to peers; give an address of this machine"),
        ));
    }
    Ok(address.to_string())
}

fn refuse(field: &'static str, what: &str) -> WorkerError {
    WorkerError::Config {
        field,
        what: what.to_owned(),
    }
}

/// Opens the checkpoint, packs the dense part and allocates the KV cache, off the runtime's threads.
pub(crate) async fn load(
    config: &WorkerConfig,
    dense: Arc<DenseWeights>,
    cards: Cards,
    loading: Loading,
) -> Result<Loaded, WorkerError> {
    let config = config.clone();
    tokio::task::spawn_blocking(move || load_now(&config, &dense, &cards, &loading)).await?
}

fn load_now(
    config: &WorkerConfig,
    dense: &DenseWeights,
    cards: &Cards,
    loading: &Loading,
) -> Result<Loaded, WorkerError> {
    let dir = PathBuf::from(&config.model_dir);
    let checkpoint = Checkpoint::open_with(&dir, &config.weights)?;
    let seats = seats(config.pinning, config.seat, config.threads)
        .map_err(|error| refuse("pinning", &format!("{error}; spec.workers.pinning: none")))?;
    let cpu = cpu(config.cpu_path, seats)
        .map_err(|error| refuse("cpu_path", &format!("{error}, or auto")))?;
    let cpu = Arc::new(cpu);
    // Memory lies on the node of the thread that writes it first.
    let _seated = cpu.enter();
    let spec = checkpoint.spec();
    let device = Device::open(config.device, Arc::clone(&cpu), cards)
        .map_err(|error| refuse("device", &error))?;
    let comms = comms(config, cards)?;
    let shape = match config.duty.runs_attention() {
        true => Some(crate::engine::kv_shape(spec, config)?),
        false => None,
    };
    device
        .plan(&checkpoint, config, shape)
        .map_err(|error| refuse("device", &error))?;
    let slots = (config.slots as usize).min(spec.experts) * spec.moe_layers();
    let expert_bytes = (slots * spec.expert_bytes()) as u64;
    let mut dense_bytes = 0;
    let attention = match shape {
        Some(shape) => {
            let model = device.model(dense, &dir, &checkpoint, |done, total| {
                dense_bytes = total;
                loading.tell(done, total + expert_bytes);
            })?;
            let kv = reserve(&device, shape, config.kv_bytes)?;
            Some(Attention { model, kv, shape })
        }
        None => None,
    };
    Ok(Loaded {
        checkpoint: Arc::new(checkpoint),
        device,
        attention,
        dense_bytes,
        comms,
    })
}

/// The processors that a worker's threads keep to.
///
/// # Errors
/// When there are too few for the wish, or the system does not tell.
pub fn seats(pinning: Pinning, seat: Seat, threads: u32) -> Result<Seats, SeatError> {
    let keep = match pinning {
        Pinning::None => return Ok(Seats::from(threads as usize)),
        Pinning::Node => Keep::Node,
        Pinning::Core => Keep::Processor,
    };
    let share = Share {
        index: seat.index as usize,
        of: seat.of as usize,
    };
    Seats::here(keep, share, threads as usize)
}

/// The processor with the path that a configuration names.
///
/// # Errors
/// When the processor does not have it.
pub fn cpu(path: CpuPath, seats: impl Into<Seats>) -> Result<Cpu, PathError> {
    use foregate_kernels::Path;
    let path = match path {
        CpuPath::Auto => return Ok(Cpu::new(seats)),
        CpuPath::Portable => Path::Portable,
        CpuPath::Neon => Path::Neon,
        CpuPath::Avx2 => Path::Avx2,
        CpuPath::Avx512 => Path::Avx512,
        CpuPath::Avx512Bf16 => Path::Avx512Bf16,
        CpuPath::Amx => Path::Amx,
    };
    Cpu::with_path(path, seats)
}

/// Room for the KV cache: address space, or a card's memory.
fn reserve(device: &Device, shape: KvShape, bytes: u64) -> Result<KvCache, WorkerError> {
    device.kv_cache(shape).map_err(|error| {
        refuse(
            "kv_bytes",
            &format!(
                "no {bytes} bytes are to be had for keys and values ({error}); lower spec.workers.kvMemory"
            ),
        )
    })
}

#[cfg(test)]
mod tests {
    use foregate_api::member::Duty;

    use super::*;

    #[test]
    fn a_cache_that_the_system_refuses_names_its_field() {
        let shape = KvShape {
            pages: u32::MAX as usize,
            page_tokens: 1 << 20,
            layers: 64,
            kv_heads: 8,
            head_dim: 128,
            dtype: foregate_kernels::KvDtype::F32,
        };
        let error = reserve(&Device::Processor(Arc::new(Cpu::new(1))), shape, 16 << 40)
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("kv_bytes: ") && error.contains("spec.workers.kvMemory"),
            "{error}"
        );
    }

    fn config() -> WorkerConfig {
        WorkerConfig {
            rank: foregate_api::ids::Rank(0),
            model_dir: "/models/tiny".to_owned(),
            weights: foregate_api::weights::WeightSettings::default(),
            served_name: "tiny".to_owned(),
            rpc_listen: "127.0.0.1:0".to_owned(),
            exchange_listen: "127.0.0.1:0".to_owned(),
            fabric: FabricKind::Tcp,
            duty: Duty::Both,
            slots: 8,
            device: Class::Cpu,
            threads: 1,
            cpu_path: CpuPath::Auto,
            pinning: Pinning::None,
            seat: Seat::ALONE,
            max_num_seqs: 1,
            max_num_batched_tokens: 1,
            max_waiting: 0,
            overtake_ms: 0,
            max_model_len: 1,
            page_tokens: 1,
            kv_bytes: 1 << 20,
            exchange_deadline_ms: 1,
            domain: String::new(),
            window_ms: 1,
        }
    }

    /// Members tell from the name of a path how it sums, so names and arithmetics must be the kernels' own.
    #[test]
    fn paths_are_those_of_the_kernels() {
        use foregate_api::cpu::Arithmetic as Told;
        use foregate_kernels::{Arithmetic, Path};

        let named = CpuPath::ALL.map(CpuPath::name);
        assert_eq!(named.len(), Path::ALL.len() + 1);
        for path in Path::ALL {
            let told: CpuPath = path.name().parse().unwrap();
            let wanted = match path.arithmetic() {
                Arithmetic::Chain => Told::Chain,
                Arithmetic::Tiles => Told::Tiles,
            };
            assert_eq!(told.arithmetic(), wanted, "{path}");
            match cpu(told, 1) {
                Ok(cpu) => assert_eq!(cpu.path(), path),
                Err(error) => assert_eq!(error.path, path),
            }
        }
        assert_eq!(
            cpu(CpuPath::Auto, 1).unwrap().path().arithmetic(),
            Arithmetic::Chain
        );
    }

    #[test]
    fn numbers_outside_their_range_are_refused_by_name() {
        assert!(check(&config()).is_ok());
        type Change = fn(&mut WorkerConfig);
        let changes: [(&str, Change); 13] = [
            ("fabric", |c| c.fabric = FabricKind::Nccl),
            ("duty", |c| {
                c.fabric = FabricKind::Nccl;
                c.device = Class::Cuda { card: 0 };
                (c.duty, c.slots) = (Duty::Attention, 0);
            }),
            ("slots", |c| c.slots = 0),
            ("slots", |c| c.duty = Duty::Attention),
            ("threads", |c| c.threads = u32::MAX),
            ("max_num_seqs", |c| c.max_num_seqs = 0),
            ("max_num_batched_tokens", |c| {
                c.max_num_batched_tokens = u32::MAX;
            }),
            ("max_waiting", |c| c.max_waiting = u32::MAX),
            ("overtake_ms", |c| c.overtake_ms = 60_001),
            ("max_model_len", |c| c.max_model_len = 0),
            ("page_tokens", |c| c.page_tokens = 257),
            ("exchange_deadline_ms", |c| {
                c.exchange_deadline_ms = u64::MAX
            }),
            ("window_ms", |c| c.window_ms = 0),
        ];
        for (field, change) in changes {
            let mut config = config();
            change(&mut config);
            let error = check(&config).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{field}: ")), "{error}");
        }
    }
}

//! What the emulation says of kernels that are wrong.

use foregate_cuda_emulate::{Fault, Order, kernels, launch};

use crate::call::Call;

fn fault(kernel: &str) -> String {
    let mut call = Call::new(kernel);
    call.output::<f32>(256);
    call.once(Order::Ascending, [1, 1, 1])
        .unwrap_err()
        .to_string()
}

#[test]
fn what_would_hang_is_a_fault() {
    assert_eq!(
        fault("fault_barrier"),
        "kernel fault_barrier: block (0, 0, 0): deadlock: of 128 threads 64 wait at __syncthreads, 0 for lanes of their \
         warp, and 64 have returned"
    );
    assert!(fault("fault_lanes").contains("16 for lanes of their warp, and 16 have returned"));
    assert!(fault("fault_mixed").contains("lanes of a warp do different things together"));
}

#[test]
fn a_thread_launches_again_after_a_fault() {
    fault("fault_barrier");
    let mut call = Call::new("fg_add");
    let x = call.memory(&[1.0_f32]);
    call.memory(&[2.0_f32]);
    call.value(1_u64).run([1, 1, 1]);
    assert_eq!(call.read::<f32>(x), [3.0]);
}

#[test]
fn what_nobody_wrote_is_not_a_number() {
    let mut call = Call::new("fault_unwritten");
    let out = call.memory(&[0.0_f32; 128]);
    call.once(Order::Ascending, [1, 1, 1]).unwrap();
    assert!(call.read::<f32>(out).iter().all(|v| v.is_nan()));

    let mut call = Call::new("fault_early");
    call.memory(&[1.0_f32; 128]);
    let out = call.memory(&[0.0_f32; 128]);
    call.once(Order::Ascending, [1, 1, 1]).unwrap();
    assert!(call.read::<f32>(out).iter().all(|v| v.is_nan()));
}

#[test]
fn a_missing_barrier_shows_in_the_order_of_threads() {
    let run = |order| {
        let mut call = Call::new("fault_race");
        let x: Vec<f32> = (0..128_u8).map(f32::from).collect();
        call.memory(&x);
        let out = call.output::<f32>(128);
        call.once(order, [1, 1, 1]).unwrap();
        call.read::<u32>(out)
    };
    assert_ne!(run(Order::Ascending), run(Order::Descending));
}

/// For `make sanitize`, which fails where a sanitizer does not find them.
#[test]
fn what_sanitizers_must_find_is_recorded() {
    let mut race = Call::new("fault_race");
    race.memory(&[1.0_f32; 128]);
    race.output::<f32>(128);
    race.record_only([1, 1, 1]);
    let mut beyond = Call::new("fault_beyond");
    beyond.output::<f32>(128);
    beyond.record_only([1, 1, 1]);
}

#[test]
fn a_launch_that_does_not_fit_is_refused() {
    let refused = |kernel: &str, grid, block, shared| -> Fault {
        // SAFETY: no kernel runs: what is refused is found before.
        unsafe { launch(kernel, grid, block, shared, &[]) }.unwrap_err()
    };
    let one = [1, 1, 1];
    assert_eq!(
        refused("fg_none", one, one, 0).why,
        "no kernel of that name"
    );
    assert_eq!(
        refused("fg_add", one, one, 0).why,
        "takes 3 arguments, got 0"
    );
    assert!(kernels().iter().all(|k| k.threads % 32 == 0));
    let with_arguments = |grid, block, shared| {
        let mut values = [0_u64; 3];
        let pointers = values.each_mut().map(|v| std::ptr::from_mut(v).cast());
        // SAFETY: as above.
        unsafe { launch("fg_add", grid, block, shared, &pointers) }
            .unwrap_err()
            .why
    };
    assert_eq!(
        with_arguments(one, [128, 1, 1], 0),
        "its blocks have 256 threads, got 128 × 1 × 1"
    );
    assert_eq!(
        with_arguments(one, [256, 1, 1], 16),
        "has no dynamic shared memory"
    );
    assert_eq!(
        with_arguments([0, 1, 1], [256, 1, 1], 0),
        "a grid that no card takes"
    );
}

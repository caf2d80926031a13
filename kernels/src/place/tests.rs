use std::sync::{Arc, Mutex};

use super::*;
use crate::executor::{Clamp, Gather, OnHost, Placed, StepRows};
use crate::{
    Add, Cpu, Dtype, KvCache, KvShape, MatMul, Matrix, Ops, Oracle, PageMap, RopeTable,
};

/// Bytes of another place.
#[derive(Debug)]
struct Far(Arc<Mutex<Vec<u8>>>);

impl Region for Far {
    fn address(&self) -> u64 {
        4096
    }

    fn bytes(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    fn device(&self) -> u64 {
        7
    }

    fn write(&self, at: usize, from: &[u8]) -> Result<(), OpError> {
        self.0.lock().unwrap()[at..at + from.len()].copy_from_slice(from);
        Ok(())
    }

    fn read(&self, at: usize, to: &mut [u8]) -> Result<(), OpError> {
        to.copy_from_slice(&self.0.lock().unwrap()[at..at + to.len()]);
        Ok(())
    }
}

fn far(bytes: usize) -> Box<dyn Region> {
    Box::new(Far(Arc::new(Mutex::new(vec![0; bytes]))))
}

fn far_array(values: &[f32]) -> Array<f32> {
    let mut array = Array(Home::Device(far(values.len() * 4), values.len()));
    array.view_mut().write(values).unwrap();
    array
}

fn host() -> OnHost {
    OnHost::new(Arc::new(Cpu::new(1)))
}

#[test]
fn an_array_is_a_vector_on_the_processor_and_keeps_its_memory() {
    let mut array = Array::of(&host(), "test", vec![1.0_f32, 2.0, 3.0]).unwrap();
    let at = array.view().host("test", "x").unwrap().as_ptr();
    for length in [1, 0, 3] {
        array.sized(&host(), "test", length).unwrap();
        assert_eq!(array.extent(), length);
    }
    assert_eq!(array.view().host("test", "x").unwrap().as_ptr(), at);
    assert!(array.view().device("test", "x").is_err());
    let mut out = [0.0; 2];
    array.slice_mut(1..3).write(&[5.0, 6.0]).unwrap();
    array.view().slice(1..9).read(&mut out).unwrap();
    assert_eq!(out, [5.0, 6.0]);
    assert!(array.view().read(&mut out).is_err(), "another length");
}

#[test]
fn parts_of_a_device_array_have_their_addresses() {
    let mut array = far_array(&[1.0, 2.0, 3.0, 4.0]);
    let part = array.view().slice(1..3).slice(1..2);
    assert_eq!(part.device("test", "x").unwrap().address(), 4096 + 8);
    let mut out = [0.0];
    part.read(&mut out).unwrap();
    assert_eq!(out, [3.0]);
    array.slice_mut(3..4).write(&[9.0]).unwrap();
    let mut all = [0.0; 4];
    array.view().read(&mut all).unwrap();
    assert_eq!(all, [1.0, 2.0, 3.0, 9.0]);
    assert_eq!(array.view().slice(7..9).extent(), 0);
}

#[test]
fn the_processor_refuses_what_a_device_has() {
    let (x, mut y) = (far_array(&[1.0]), vec![1.0]);
    let add = Add {
        x: (&mut y).into(),
        y: x.view(),
    };
    let error = host().add(add).unwrap_err();
    assert_eq!(
        error.to_string(),
        "add: y is in a device's memory, where the processor cannot compute"
    );

    let w = Matrix::on_device(Dtype::F32, 2, 3, far(24)).unwrap();
    assert_eq!((w.bytes(), w.unpack().unwrap()), (24, vec![0; 24]));
    assert!(Matrix::on_device(Dtype::F32, 2, 3, far(23)).is_err());
    assert!(w.row(0, &mut [0.0; 3]).is_err());
    for ops in [&Cpu::new(1) as &dyn Ops, &Oracle] {
        let error = ops.matmul(MatMul {
            x: &[0.0; 3],
            rows: 1,
            w: &w,
            bias: None,
            out: &mut [0.0; 2],
        });
        let error = error.unwrap_err().to_string();
        assert!(error.contains("weight, bytes in this process"), "{error}");
        refuses_cache(ops);
    }
}

fn refuses_cache(ops: &dyn Ops) {
    let shape = KvShape {
        layers: 1,
        pages: 1,
        page_tokens: 4,
        kv_heads: 1,
        head_dim: 2,
        dtype: crate::KvDtype::F32,
    };
    let mut kv = KvCache::on_device(shape, far(64)).unwrap();
    let refused: Result<(), OpError> = ops.kv_write(crate::KvWrite {
        k: &[0.0; 2],
        v: &[0.0; 2],
        positions: &[0],
        pages: PageMap {
            sequence_of_row: &[0],
            tables: &[&[0]],
        },
        kv: &mut kv,
        layer: 0,
    });
    assert!(refused.unwrap_err().to_string().contains("in this process"));
    assert!(kv.copy_page(0, 0).is_err());
}

#[test]
fn rows_are_gathered_and_values_clamped() {
    let host = host();
    let x = vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
    let mut out = vec![0.0; 4];
    host.gather(Gather {
        x: (&x).into(),
        width: 2,
        rows: &[2, 0],
        out: (&mut out).into(),
    })
    .unwrap();
    assert_eq!(out, [5.0, 6.0, 1.0, 2.0]);
    for rows in [&[3, 0][..], &[0]] {
        let refused = host.gather(Gather {
            x: (&x).into(),
            width: 2,
            rows,
            out: (&mut out).into(),
        });
        assert!(refused.is_err());
    }
    let clamp = |out: &mut Vec<f32>, limit| {
        host.clamp(Clamp {
            x: out.into(),
            limit,
        })
    };
    clamp(&mut out, 4.5).unwrap();
    assert_eq!(out, [4.5, 4.5, 1.0, 2.0]);
    assert!(clamp(&mut out, f32::NAN).is_err());
    let rows = StepRows {
        positions: &[],
        pages: PageMap {
            sequence_of_row: &[],
            tables: &[],
        },
        angles: &RopeTable::default(),
        group: 1,
    };
    host.place(rows, &mut Placed::default()).unwrap();
}

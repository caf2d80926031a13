//! Keys and values into pages, and attention over them.

use foregate_kernels::{Attention, KvCache, KvDtype, KvShape, KvWrite, Ops, Oracle, PageMap};

use crate::call::Call;
use crate::numbers::{EPS, Random, assert_close, bits, rounded};

/// Sequences in one cache, with what was written to it.
struct World {
    shape: KvShape,
    heads: usize,
    layer: usize,
    /// Pages of each sequence.
    tables: Vec<Vec<u32>>,
    /// Sequence and position of every token that is written, with its keys and its values.
    tokens: Vec<(u32, u32)>,
    k: Vec<f32>,
    v: Vec<f32>,
}

const STRIDE_SPARE: usize = 2;

impl World {
    fn random(
        random: &mut Random,
        mut shape: KvShape,
        heads: usize,
        lengths: &[usize],
    ) -> Self {
        let needed = |l: &usize| l.div_ceil(shape.page_tokens);
        // A few more than are used.
        shape.pages = 3 + lengths.iter().map(needed).sum::<usize>();
        // Pages in no order.
        let mut free: Vec<u32> = (0..shape.pages as u32).collect();
        let mut page = || free.swap_remove(random.below(free.len()));
        let tables: Vec<Vec<u32>> = lengths
            .iter()
            .map(|l| (0..l.div_ceil(shape.page_tokens)).map(|_| page()).collect())
            .collect();
        let tokens: Vec<(u32, u32)> = (0_u32..)
            .zip(lengths)
            .flat_map(|(s, l)| (0..*l as u32).map(move |p| (s, p)))
            .collect();
        let count = tokens.len() * shape.kv_heads * shape.head_dim;
        Self {
            layer: shape.layers - 1,
            k: random.floats(count),
            v: random.floats(count),
            shape,
            heads,
            tables,
            tokens,
        }
    }

    fn half(&self) -> bool {
        self.shape.dtype == KvDtype::Bf16
    }

    fn stride(&self) -> usize {
        self.tables.iter().map(Vec::len).max().unwrap() + STRIDE_SPARE
    }

    /// Tables side by side; beyond a sequence's pages there is nothing that may be looked up.
    fn flat_tables(&self) -> Vec<u32> {
        let mut flat = vec![u32::MAX; self.tables.len() * self.stride()];
        for (row, table) in flat.chunks_mut(self.stride()).zip(&self.tables) {
            row[..table.len()].copy_from_slice(table);
        }
        flat
    }

    fn sizes(&self, call: &mut Call) {
        let s = self.shape;
        for size in [s.layers, self.layer, s.page_tokens] {
            call.value(size as u32);
        }
    }

    /// The cache after the device has written all tokens; what it did not write is not a number.
    fn device_cache(&self) -> Cache {
        let s = self.shape;
        let (sequences, positions): (Vec<u32>, Vec<u32>) = self.tokens.iter().copied().unzip();
        let count = s.pages * s.layers * 2 * s.kv_heads * s.page_tokens * s.head_dim;
        let mut call = Call::new(if self.half() {
            "fg_kv_write_bf16"
        } else {
            "fg_kv_write_f32"
        });
        call.memory(&self.k);
        call.memory(&self.v);
        call.memory(&positions);
        call.memory(&sequences);
        call.memory(&self.flat_tables());
        call.value(self.stride() as u32);
        let cache = if self.half() {
            call.output::<u16>(count)
        } else {
            call.output::<f32>(count)
        };
        self.sizes(&mut call);
        call.value(s.kv_heads as u32).value(s.head_dim as u32);
        call.run([self.tokens.len() as u32, 1, 1]);
        if self.half() {
            Cache::Half(call.read(cache))
        } else {
            Cache::Float(call.read(cache))
        }
    }

    fn oracle(&self, q: &[f32], rows: &[(u32, u32)], scale: f32) -> Vec<f32> {
        let mut kv = KvCache::new(self.shape).unwrap();
        let tables: Vec<&[u32]> = self.tables.iter().map(Vec::as_slice).collect();
        let (sequences, positions): (Vec<u32>, Vec<u32>) = self.tokens.iter().copied().unzip();
        let pages = PageMap {
            sequence_of_row: &sequences,
            tables: &tables,
        };
        Oracle
            .kv_write(KvWrite {
                k: &self.k,
                v: &self.v,
                positions: &positions,
                pages,
                kv: &mut kv,
                layer: self.layer,
            })
            .unwrap();
        let (sequences, positions): (Vec<u32>, Vec<u32>) = rows.iter().copied().unzip();
        let mut out = vec![0.0; q.len()];
        Oracle
            .attention(Attention {
                q,
                heads: self.heads,
                scale,
                positions: &positions,
                pages: PageMap {
                    sequence_of_row: &sequences,
                    tables: &tables,
                },
                kv: &kv,
                layer: self.layer,
                out: &mut out,
            })
            .unwrap();
        out
    }

    fn kernel(&self) -> (&'static str, usize) {
        match (self.half(), self.shape.head_dim) {
            (false, _) => ("fg_attention_f32", 64),
            (true, ..=64) => ("fg_attention_bf16_d64", 64),
            (true, ..=128) => ("fg_attention_bf16_d128", 64),
            (true, _) => ("fg_attention_bf16_d256", 32),
        }
    }

    /// Cuts rows into tiles of at most `most` rows of one sequence.
    fn tiles(&self, rows: &[(u32, u32)], most: usize) -> (Vec<u32>, Vec<u32>) {
        let (_, queries) = self.kernel();
        let most = most
            .min(queries / (self.heads / self.shape.kv_heads))
            .max(1);
        let (mut first, mut count): (Vec<u32>, Vec<u32>) = (Vec::new(), Vec::new());
        for (row, (sequence, _)) in rows.iter().enumerate() {
            match (first.last(), count.last_mut()) {
                (Some(f), Some(c))
                    if rows[*f as usize].0 == *sequence && (*c as usize) < most =>
                {
                    *c += 1
                }
                _ => {
                    first.push(row as u32);
                    count.push(1);
                }
            }
        }
        (first, count)
    }

    fn attend(
        &self,
        cache: &Cache,
        q: &[f32],
        rows: &[(u32, u32)],
        scale: f32,
        most: usize,
        spare: usize,
    ) -> Vec<f32> {
        let s = self.shape;
        let (sequences, positions): (Vec<u32>, Vec<u32>) = rows.iter().copied().unzip();
        let splits = *positions.iter().max().unwrap() as usize / 512 + 1 + spare;
        let (first, count) = self.tiles(rows, most);
        let mut call = Call::new(self.kernel().0);
        call.memory(q);
        match cache {
            Cache::Half(cache) => call.memory(cache),
            Cache::Float(cache) => call.memory(cache),
        };
        call.memory(&positions);
        call.memory(&sequences);
        call.memory(&self.flat_tables());
        call.value(self.stride() as u32);
        call.memory(&first);
        call.memory(&count);
        self.sizes(&mut call);
        for size in [self.heads, s.kv_heads, s.head_dim] {
            call.value(size as u32);
        }
        call.value(scale).value(splits as u32);
        let queries = rows.len() * self.heads;
        let grid = [first.len() as u32, s.kv_heads as u32, splits as u32];
        if splits == 1 {
            (0..3).for_each(|_| call.null());
            let out = call.output::<f32>(q.len());
            call.run(grid);
            return call.read(out);
        }
        let part = call.output::<f32>(queries * splits * s.head_dim);
        let (most, sum) = (
            call.output::<f32>(queries * splits),
            call.output::<f32>(queries * splits),
        );
        call.null();
        call.run(grid);

        let mut merge = Call::new("fg_attention_merge");
        merge.memory(&call.read::<f32>(part));
        merge.memory(&call.read::<f32>(most));
        merge.memory(&call.read::<f32>(sum));
        merge.memory(&positions);
        let out = merge.output::<f32>(q.len());
        for size in [self.heads, s.head_dim, splits] {
            merge.value(size as u32);
        }
        merge.run([rows.len() as u32, self.heads as u32, 1]);
        merge.read(out)
    }
}

enum Cache {
    Half(Vec<u16>),
    Float(Vec<f32>),
}

fn shape(dtype: KvDtype, page_tokens: usize, kv_heads: usize, head_dim: usize) -> KvShape {
    KvShape {
        layers: 2,
        pages: 40,
        page_tokens,
        kv_heads,
        head_dim,
        dtype,
    }
}

#[test]
fn tokens_are_written_where_the_layout_says() {
    let mut random = Random(71);
    for dtype in [KvDtype::Bf16, KvDtype::F32] {
        let world = World::random(&mut random, shape(dtype, 4, 3, 10), 3, &[9, 1]);
        let s = world.shape;
        let mut want =
            vec![f32::NAN; s.pages * s.layers * 2 * s.kv_heads * s.page_tokens * s.head_dim];
        for (token, (sequence, position)) in world.tokens.iter().enumerate() {
            let position = *position as usize;
            let page = world.tables[*sequence as usize][position / 4] as usize;
            for (which, values) in [&world.k, &world.v].into_iter().enumerate() {
                for head in 0..3 {
                    let block = ((page * 2 + world.layer) * 2 + which) * 3 + head;
                    let to = (block * 4 + position % 4) * 10;
                    want[to..to + 10].copy_from_slice(&values[(token * 3 + head) * 10..][..10]);
                }
            }
        }
        match world.device_cache() {
            Cache::Float(got) => assert_eq!(
                bits(&got).iter().filter(|b| **b != u32::MAX).count(),
                10 * 3 * 10 * 2,
            ),
            Cache::Half(got) => {
                for (got, want) in got.iter().zip(&want) {
                    assert_eq!(
                        *got,
                        if want.is_nan() {
                            0xffff
                        } else {
                            rounded(&[*want])[0]
                        }
                    );
                }
                continue;
            }
        }
        let Cache::Float(got) = world.device_cache() else {
            continue;
        };
        assert_close(&got, &want, |_| 0.0);
    }
}

/// Roundings of a query and of numerators to bfloat16 (the oracle rounds only queries), or of float32 alone.
fn bound(world: &World, longest: usize) -> f64 {
    let most = world.v.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
    let each = if world.half() {
        1.0 / 256.0
    } else {
        EPS * (longest as f64 + 300.0)
    };
    f64::from(most) * each
}

#[test]
fn close_to_the_oracle_whatever_shares_a_tile() {
    let mut random = Random(72);
    for (dtype, page_tokens, kv_heads, head_dim, heads, lengths) in [
        (KvDtype::Bf16, 16, 2, 64, 4, vec![1, 32, 33, 70]),
        (KvDtype::Bf16, 7, 1, 128, 8, vec![40, 95]),
        (KvDtype::Bf16, 16, 2, 20, 2, vec![50]), // heads of no whole run of 8
        (KvDtype::Bf16, 32, 1, 256, 3, vec![37]),
        (KvDtype::Bf16, 16, 1, 64, 2, vec![600, 5]), // more than one split
        (KvDtype::F32, 5, 2, 48, 6, vec![31, 64]),
        (KvDtype::F32, 16, 1, 16, 1, vec![1030, 512, 513]),
    ] {
        let longest = *lengths.iter().max().unwrap();
        let mut world = World::random(
            &mut random,
            shape(dtype, page_tokens, kv_heads, head_dim),
            heads,
            &lengths,
        );
        // The last rows of every sequence, as in a chunk of a prompt.
        let rows: Vec<(u32, u32)> = (0_u32..)
            .zip(&lengths)
            .flat_map(|(s, l)| (l.saturating_sub(19)..*l).map(move |p| (s, p as u32)))
            .collect();
        let q: Vec<f32> = random
            .floats(rows.len() * heads * head_dim)
            .iter()
            .map(|x| x * 3.0)
            .collect();
        let scale = 1.0 / (head_dim as f32).sqrt();
        let cache = world.device_cache();
        let got = world.attend(&cache, &q, &rows, scale, 64, 0);
        let want = world.oracle(&q, &rows, scale);
        let bound = bound(&world, longest);
        assert_close(&got, &want, |_| bound);

        // As a decode step has it, and with tiles of another size, and with more splits than needed.
        for (most, spare) in [(1, 0), (3, 1)] {
            let other = world.attend(&cache, &q, &rows, scale, most, spare);
            assert_eq!(
                bits(&other),
                bits(&got),
                "{dtype:?} {head_dim}: tiles of {most}"
            );
        }
        let width = heads * head_dim;
        for row in [0, rows.len() / 2, rows.len() - 1] {
            let alone = world.attend(
                &cache,
                &q[row * width..(row + 1) * width],
                &rows[row..=row],
                scale,
                1,
                0,
            );
            assert_eq!(bits(&alone), bits(&got[row * width..(row + 1) * width]));
        }
        // A key that is not a number in one sequence does not reach another.
        world.k[0] = f32::NAN;
        let spoilt = world.attend(&world.device_cache(), &q, &rows, scale, 64, 0);
        for (row, (sequence, _)) in rows.iter().enumerate() {
            let range = row * width..(row + 1) * width;
            if *sequence == 0 {
                assert!(spoilt[range][..head_dim].iter().all(|v| v.is_nan()));
            } else {
                assert_eq!(bits(&spoilt[range.clone()]), bits(&got[range]));
            }
        }
    }
}

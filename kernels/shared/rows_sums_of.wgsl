// The sums over items `first`, `first + step` and so on: of rows x and y of `m`, and z and w of `n`,
// which has the same shape and format.
fn sums_{each}(m: Pieces, n: Pieces, rows: vec4<u32>, x_stride: u32, first: u32, step: u32) -> Sums {
    var sums = Sums();
    let end = items(m);
    for (var i = first; i < end; i += step) {
        let w0 = taken_{each}(m, rows.x, i);
        let w1 = taken_{each}(m, rows.y, i);
        let w2 = taken_{each}(n, rows.z, i);
        let w3 = taken_{each}(n, rows.w, i);
//!repeat t in {most}
        if ({t}u < tokens) {
            let a = acts(m, (first_token + {t}u) * x_stride, i);
            sums.s{t} += vec4<f32>(times_{each}(w0, a), times_{each}(w1, a), times_{each}(w2, a), times_{each}(w3, a));
        }
//!end
    }
    return sums;
}

//! A causal convolution of each channel with its own short filter.

use crate::graph::ConvForm;

/// `x` is `[T, 3 * channels]` or `[T, channels]` (`x_width` a row), `filter` `[channels, taps]`, `out`
/// `[T, channels]`. `before` and `after` are the last `taps - 1` inputs, oldest first, before and
/// after these tokens.
pub fn conv(
    x: &[f32],
    filter: &[f32],
    form: ConvForm,
    before: Vec<f32>,
    after: &mut [f32],
    x_width: usize,
    out: &mut [f32],
) {
    let channels = match form {
        ConvForm::Gated => x_width / 3,
        ConvForm::Silu => x_width,
    };
    let taps = filter.len() / channels;
    let mut past = before;
    for (x, out) in x.chunks_exact(x_width).zip(out.chunks_exact_mut(channels)) {
        for (c, out) in out.iter_mut().enumerate() {
            past.push(match form {
                ConvForm::Gated => x[c] * x[2 * channels + c],
                ConvForm::Silu => x[c],
            });
            let inputs = past[c..].iter().step_by(channels);
            let sum: f32 = filter[c * taps..][..taps].iter().zip(inputs).map(|(f, x)| f * x).sum();
            *out = match form {
                ConvForm::Gated => x[channels + c] * sum,
                ConvForm::Silu => sum / (1.0 + (-sum).exp()),
            };
        }
        past.drain(..channels);
    }
    after.copy_from_slice(&past);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_channel_sees_its_own_last_inputs_in_whatever_batches_they_come() {
        // Two channels, three taps.
        let filter = [1.0, 10.0, 100.0, -1.0, 0.0, 2.0];
        let xs = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0];
        let silu = |x: f32| x / (1.0 + (-x).exp());
        let want = [100.0, 4.0, 310.0, 8.0, 531.0, 10.0, 753.0, 12.0].map(silu);
        for split in [0, 2, 6, 8] {
            let (mut state, mut out) = (vec![0.0; 4], [0.0; 8]);
            let (first, last) = out.split_at_mut(split);
            for (x, out) in [(&xs[..split], first), (&xs[split..], last)] {
                let mut after = vec![9.0; 4];
                conv(x, &filter, ConvForm::Silu, state, &mut after, 2, out);
                state = after;
            }
            assert_eq!((out, state), (want, vec![5.0, 6.0, 7.0, 8.0]), "{split}");
        }
    }

    #[test]
    fn the_gated_form_multiplies_before_and_after() {
        let (mut after, mut out) = ([0.0], [0.0; 2]);
        let x = [2.0, 5.0, 3.0, 7.0, -1.0, 1.0];
        conv(&x, &[1.0, 10.0], ConvForm::Gated, vec![0.5], &mut after, 3, &mut out);
        assert_eq!((out, after), ([5.0 * 60.5, -76.0], [7.0]));
    }
}

//! `x *= ` a weight of one element.

pub fn scale(x: &mut [f32], by: f32) {
    x.iter_mut().for_each(|x| *x *= by);
}

//! Runs a token's experts without barriers, for software adapters: the kernels for a prompt of one
//! token, with slots looked up in the table that the device keeps for tokens. `decode_seek` halts
//! the step if an expert has no slot. Nothing is fetched from host memory.

use super::super::live::Form;
use super::super::params;
use super::super::token::{Aside, Fuse, Rewritten};
use super::experts::{Routing, aside};
use crate::backend::Result;
use crate::gpu::dispatch::{Grid, Rows};
use crate::gpu::experts::Home;
use crate::gpu::lower::{Place, Recipe, recipe_grid, word};
use crate::graph::{Buf, MoeId, Op};

/// Chooses a layer's experts, looks up their slots, and sets aside what is needed to restart the
/// layer.
pub(super) fn route(
    fuse: &mut Fuse<'_>,
    routing: &Routing,
    kept: &[Aside<Place>],
) -> Result<Vec<Recipe>> {
    let Routing { moe, logits, scoring, bias } = *routing;
    let mut recipes = fuse.one_row(&Op::Route { moe, logits, scoring, bias })?;
    let params = params::Seek {
        top_k: word(fuse.lower.graph.moe_spec(moe).top_k)?,
        table_at: word(fuse.layout.row(moe))?,
        ids_at: word(fuse.layout.ids_at[usize::from(moe.0)])?,
        halt: u32::from(moe.0) + 1,
    };
    let storage = [Place::Ids(moe), Place::ExpertPlaces, Place::State];
    recipes.push(recipe_grid("decode_seek", &params, &storage, Rows::Tokens, Grid::One));
    for value in kept {
        recipes.push(aside(moe, value)?);
    }
    Ok(recipes)
}

/// A layer's experts and the sum of their outputs.
pub(super) fn experts(
    fuse: &mut Fuse<'_>,
    (moe, x, out): (MoeId, Buf, Buf),
    home: &Home,
) -> Result<Rewritten> {
    let places = (Place::ExpertPlaces, fuse.layout.row(moe));
    let mut recipes = fuse.lower.wave(moe, x, home.chunk, places)?;
    recipes.retain(|recipe| recipe.when.contains(&1));
    recipes.extend(fuse.one_row(&Op::Experts { moe, x, out })?);
    Ok(Rewritten::new(1, recipes, &[(x, Form::Plain)], &[(out, Form::Plain)]).lasting())
}

//! The tools that a request offers, and whether the model must call one. Pure.

use serde_json::{Value, json};

use super::answer::Reading;
use super::failed::Failed;
use super::tools::held::{self, Held};
use super::tools::{Parser, Syntax};
use crate::engine::{EngineError, Opened};
use doppler_infer::grammar::Constraint;
use doppler_infer::template;

/// Whether a tool is called.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Choice {
    /// The model decides.
    #[default]
    Auto,
    Never,
    /// It calls one.
    Any,
    /// It calls this one.
    This(String),
}

/// Tools as templates take them (OpenAI's form), and how they are used.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Offer {
    pub tools: Vec<Value>,
    pub choice: Choice,
    /// At most one call in an answer.
    pub one_call: bool,
    /// The tools whose arguments must fit their schemas, whenever they are called.
    pub strict: Vec<String>,
}

/// A function as templates take it.
pub fn function(name: &str, description: Option<&str>, parameters: Option<&Value>) -> Value {
    let parameters = parameters.filter(|value| value.is_object()).cloned();
    let parameters = parameters.unwrap_or_else(|| json!({ "type": "object", "properties": {} }));
    let description = description.unwrap_or_default();
    json!({
        "type": "function",
        "function": { "name": name, "description": description, "parameters": parameters },
    })
}

impl Offer {
    pub fn names(&self) -> Vec<String> {
        let name = |tool: &Value| tool["function"]["name"].as_str().map(str::to_owned);
        self.tools.iter().filter_map(name).collect()
    }

    /// Checks the choice against the tools, and drops tools that may not be called.
    ///
    /// # Errors
    /// If a call is demanded of a tool that is not offered.
    pub fn checked(mut self) -> Result<Self, Failed> {
        let names = self.names();
        match &self.choice {
            Choice::This(name) if !names.contains(name) => {
                return Err(Failed::field("tool_choice", format!("no tool is named {name:?}")));
            }
            Choice::Any if names.is_empty() => {
                return Err(Failed::field("tool_choice", "no tools are offered"));
            }
            Choice::Never => self.tools.clear(),
            _ => {}
        }
        Ok(self)
    }

    /// How an answer of this model is read: the calls in it are found, one that must be a call is begun,
    /// and its arguments, or else the answer, have the form that is asked for. Compiles grammars.
    ///
    /// # Errors
    /// If tools are offered to a model whose template does not teach them, or in an unknown way, or a
    /// schema is refused.
    pub fn reading(&self, opened: &Opened, form: Option<&Constraint>) -> Result<Reading, Failed> {
        if self.tools.is_empty() {
            return Ok(Reading { constraint: form.cloned(), ..Reading::default() });
        }
        let chat = opened.model.manifest.chat.as_ref();
        let source = chat.and_then(|chat| template::source(chat, true));
        let Some(syntax) = source.and_then(Syntax::of) else {
            return Err(Failed::field(
                "tools",
                "this model's chat template offers no tools, or in a way that is not known here",
            ));
        };
        let names = self.names();
        let begin = match (&self.choice, &names[..]) {
            (Choice::Auto | Choice::Never, _) => String::new(),
            (Choice::This(name), _) => syntax.begin(Some(name)),
            (Choice::Any, [only]) => syntax.begin(Some(only)),
            (Choice::Any, _) => syntax.begin(None),
        };
        let tokenizer = &opened.tokenizer;
        let is_special = |id| tokenizer.decode(&[id]).is_ok_and(|text| text.is_empty());
        let markers = Syntax::markers(|text| tokenizer.id_of(text), is_special);
        let constraint = self.constraint(syntax, opened, &markers, form)?;
        let parser = Some(Parser::new(syntax, names));
        Ok(Reading { parser, begin, markers, one_call: self.one_call, constraint })
    }

    fn held(&self) -> Vec<Held> {
        let held = |tool: &Value| {
            let function = &tool["function"];
            let name = function["name"].as_str()?.to_owned();
            Some(Held { name, schema: object_schema(&function["parameters"]) })
        };
        let wanted = |held: &Held| match &self.choice {
            Choice::This(name) => held.name == *name,
            _ => true,
        };
        self.tools.iter().filter_map(held).filter(wanted).collect()
    }

    /// What an answer must look like. The schemas of tools that are not strict are advice: if one cannot
    /// be compiled, arguments are only held to be an object.
    fn constraint(
        &self,
        syntax: Syntax,
        opened: &Opened,
        markers: &[(u32, &'static str)],
        form: Option<&Constraint>,
    ) -> Result<Option<Constraint>, Failed> {
        let must_call = matches!(self.choice, Choice::Any | Choice::This(_));
        let is_strict = |held: &Held| self.strict.contains(&held.name);
        let tools = self.held();
        let instead = match form {
            None => None,
            Some(Constraint::JsonSchema(schema)) => Some(schema),
            Some(_) => {
                let why = "with tools, only text, json_object and json_schema are possible";
                return Err(Failed::field("tools", why));
            }
        };
        if !must_call && instead.is_none() && !tools.iter().any(is_strict) {
            return Ok(None);
        }
        let named = tools.len() == 1;
        let made = |tools: &[Held]| match must_call {
            true => held::demanded(syntax, tools, named, markers),
            false => held::free(syntax, tools, markers, instead),
        };
        let compile = |constraint: &Constraint| {
            opened.tokenizer.grammar(constraint, &opened.model.manifest.eos_token_ids)
        };
        let whole = made(&tools);
        let Err(error) = compile(&whole) else { return Ok(Some(whole)) };
        for held in tools.iter().filter(|held| is_strict(held)) {
            // Alone it says where it is at fault.
            if let Err(error) = compile(&Constraint::JsonSchema(held.schema.clone())) {
                let failed = Failed::of(&EngineError::from(error).into());
                let message = format!("tools: {}: {}", held.name, failed.message);
                return Err(Failed { param: Some("tools".to_owned()), message, ..failed });
            }
        }
        let loose = |held: &Held| if is_strict(held) { held.clone() } else { held.loose() };
        let loose = made(&tools.iter().map(loose).collect::<Vec<_>>());
        match compile(&loose) {
            Ok(_) => Ok(Some(loose)),
            Err(_) => Err(Failed::of(&EngineError::from(error).into())),
        }
    }
}

/// The schema of a tool's arguments, which are an object even if it does not say so.
fn object_schema(parameters: &Value) -> Value {
    let mut schema = parameters.as_object().cloned().unwrap_or_default();
    if !schema.contains_key("$ref") {
        schema.insert("type".to_owned(), "object".into());
    }
    schema.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_demanded_tool_must_be_offered() {
        let offer =
            |choice| Offer { tools: vec![function("f", None, None)], choice, ..Offer::default() };
        assert_eq!(offer(Choice::Never).checked().unwrap().tools, [] as [Value; 0]);
        assert_eq!(offer(Choice::This("f".into())).checked().unwrap().names(), ["f"]);
        let failed = offer(Choice::This("g".into())).checked().unwrap_err();
        assert_eq!(failed.param.as_deref(), Some("tool_choice"));
        let none = Offer { choice: Choice::Any, ..Offer::default() };
        assert!(none.checked().is_err());
    }
}

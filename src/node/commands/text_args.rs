//! From the arguments of `run` and `chat` to the request for a text.
//!
//! Files and standard input are read here, within the longest prompt. A prompt stays as it is, down
//! to its last newline.

use std::io::Read;
use std::path::Path;

use anyhow::{Context, ensure};
use serde_json::Value;

use crate::adapters;
use crate::api::GenerateRequest;
use crate::args::{FormArgs, ModelArgs, RunArgs, SamplingArgs, Thinking};
use doppler_infer::grammar::Constraint;
use doppler_infer::template::Conversation;
use doppler_infer::tokenizer::PROMPT_BYTES_MAX;

/// What `run` asks for.
///
/// # Errors
/// If the prompt or the tools cannot be read.
pub fn run_request(args: &RunArgs) -> anyhow::Result<GenerateRequest> {
    let prompt = match (&args.prompt, &args.prompt_file) {
        (Some(prompt), _) => prompt.clone(),
        (None, Some(file)) => read_file(file)?,
        (None, None) => String::new(),
    };
    let request = GenerateRequest {
        tokens: args.tokens,
        logprobs: args.logprobs,
        adapters: adapters::asked(&args.adapters.adapters)?,
        constraint: constraint(&args.form)?,
        ..request(&args.model, &args.sampling)
    };
    if !args.turn.chat {
        return Ok(GenerateRequest { prompt, ..request });
    }
    let tools = args.turn.tools.as_deref().map_or_else(|| Ok(Vec::new()), read_tools)?;
    let system = args.turn.system.iter().map(|text| Conversation::message("system", text));
    let messages = system.chain([Conversation::message("user", &prompt)]).collect();
    let thinking = args.turn.thinking.map(thinks);
    Ok(GenerateRequest { chat: Some(Conversation { messages, tools, thinking }), ..request })
}

fn constraint(form: &FormArgs) -> anyhow::Result<Option<Constraint>> {
    if let Some(file) = &form.json_schema {
        let schema = serde_json::from_str(&read_file(file)?);
        let schema = schema.with_context(|| format!("{} is not JSON", file.display()))?;
        return Ok(Some(Constraint::JsonSchema(schema)));
    }
    match &form.grammar {
        Some(file) => Ok(Some(Constraint::Lark(read_file(file)?))),
        None => Ok(form.regex.clone().map(Constraint::Regex)),
    }
}

/// A request for this model, without prompt and tokens.
pub fn request(model: &ModelArgs, sampling: &SamplingArgs) -> GenerateRequest {
    GenerateRequest {
        model: model.name().into_owned(),
        temperature: sampling.temperature,
        top_p: sampling.top_p,
        top_k: sampling.top_k,
        min_p: sampling.min_p,
        repetition_penalty: sampling.repetition_penalty,
        presence_penalty: sampling.presence_penalty,
        frequency_penalty: sampling.frequency_penalty,
        repeat_last_n: Some(sampling.repeat_last_n),
        seed: sampling.seed,
        logit_bias: sampling.logit_bias.clone(),
        stop: sampling.stop.clone(),
        context: model.context,
        ..GenerateRequest::default()
    }
}

pub fn thinks(thinking: Thinking) -> bool {
    thinking == Thinking::On
}

/// A file's text; `-` is standard input.
fn read_file(path: &Path) -> anyhow::Result<String> {
    if path == Path::new("-") {
        return read_text(std::io::stdin().lock(), "standard input");
    }
    let name = path.display().to_string();
    let file = std::fs::File::open(path).with_context(|| format!("cannot read {name}"))?;
    read_text(file, &name)
}

fn read_text(from: impl Read, name: &str) -> anyhow::Result<String> {
    let mut bytes = Vec::new();
    let most = PROMPT_BYTES_MAX as u64;
    from.take(most + 1).read_to_end(&mut bytes).with_context(|| format!("cannot read {name}"))?;
    ensure!(bytes.len() as u64 <= most, "{name} is longer than a prompt may be: {most} bytes");
    String::from_utf8(bytes).with_context(|| format!("{name} is not UTF-8 text"))
}

fn read_tools(path: &Path) -> anyhow::Result<Vec<Value>> {
    let text = read_file(path)?;
    let tools = serde_json::from_str(&text);
    tools.with_context(|| format!("{} is not a JSON list of functions", path.display()))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Command, RawArgs};

    fn asked(words: &[&str]) -> anyhow::Result<GenerateRequest> {
        let args = ["doppler-node", "run", "m"].iter().chain(words);
        let Command::Run(run) = RawArgs::try_parse_from(args)?.command else { panic!("not run") };
        run_request(&run)
    }

    #[test]
    fn a_prompt_stays_as_it_is_and_a_message_becomes_a_conversation() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("prompt.txt");
        std::fs::write(&file, " raw <s>\n\n").unwrap();
        let path = file.to_str().unwrap();
        let raw = asked(&["--prompt-file", path]).unwrap();
        assert_eq!((raw.prompt.as_str(), raw.chat), (" raw <s>\n\n", None));
        let tools = dir.path().join("tools.json");
        std::fs::write(&tools, r#"[{ "type": "function" }]"#).unwrap();
        let tools = tools.to_str().unwrap();
        let words =
            ["-p", "Hi", "--chat", "--system", "- s", "--tools", tools, "--thinking", "off"];
        let said = asked(&words).unwrap();
        assert_eq!(said.prompt, "");
        let chat = said.chat.unwrap();
        let messages =
            [Conversation::message("system", "- s"), Conversation::message("user", "Hi")];
        assert_eq!((chat.messages.as_slice(), chat.thinking), (&messages[..], Some(false)));
        assert_eq!(chat.tools.len(), 1);
        for (bytes, word) in [(&b"\xff"[..], "UTF-8"), (b"{}", "JSON list")] {
            std::fs::write(&file, bytes).unwrap();
            let error = asked(&["-p", "x", "--chat", "--tools", path]).unwrap_err();
            assert!(format!("{error:#}").contains(word), "{error:#}");
        }
        let missing = dir.path().join("none");
        let error = asked(&["--prompt-file", missing.to_str().unwrap()]).unwrap_err();
        assert!(format!("{error:#}").contains("cannot read"), "{error:#}");
    }

    #[test]
    fn a_form_is_read_from_its_file_or_given() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("form");
        std::fs::write(&file, "{ \"type\": \"null\" }").unwrap();
        let path = file.to_str().unwrap();
        let form =
            |words: &[&str]| asked(&[&["-p", "x"][..], words].concat()).map(|r| r.constraint);
        let schema = Constraint::JsonSchema(serde_json::json!({ "type": "null" }));
        assert_eq!(form(&["--json-schema", path]).unwrap(), Some(schema));
        let lark = Constraint::Lark("{ \"type\": \"null\" }".into());
        assert_eq!(form(&["--grammar", path]).unwrap(), Some(lark));
        assert_eq!(form(&["--regex", "-a"]).unwrap(), Some(Constraint::Regex("-a".into())));
        assert_eq!(form(&[]).unwrap(), None);
        assert!(form(&["--regex", "a", "--grammar", path]).is_err());
        std::fs::write(&file, "{").unwrap();
        let error = form(&["--json-schema", path]).unwrap_err();
        assert!(format!("{error:#}").contains("is not JSON"), "{error:#}");
    }

    #[test]
    fn every_sampling_option_reaches_the_request() {
        let words = [
            "-p",
            "x",
            "--temp",
            "0.5",
            "--top-k",
            "3",
            "--top-p",
            "0.9",
            "--min-p",
            "0.1",
            "--repeat-penalty",
            "1.1",
            "--presence-penalty",
            "0.2",
            "--frequency-penalty",
            "-0.3",
            "--repeat-last-n",
            "9",
            "--seed",
            "7",
            "--logit-bias",
            "4+1",
            "--logit-bias",
            "5-2",
            "--stop",
            "-a",
            "--stop",
            "b",
            "-n",
            "6",
            "--json",
            "--logprobs",
            "2",
        ];
        let got = asked(&words).unwrap();
        let want = GenerateRequest {
            model: "m".into(),
            prompt: "x".into(),
            tokens: 6,
            temperature: 0.5,
            top_k: 3,
            top_p: 0.9,
            min_p: 0.1,
            repetition_penalty: 1.1,
            presence_penalty: 0.2,
            frequency_penalty: -0.3,
            repeat_last_n: Some(9),
            seed: 7,
            logit_bias: vec![(4, 1.0), (5, -2.0)],
            logprobs: Some(2),
            stop: vec!["-a".into(), "b".into()],
            ..GenerateRequest::default()
        };
        assert_eq!(serde_json::to_value(&got).unwrap(), serde_json::to_value(&want).unwrap());
        assert_eq!(got.sampler().repetition_window, 9);
    }
}

//! Chat templates as Hugging Face runs them: Jinja with `trim_blocks` and `lstrip_blocks`, loop controls,
//! Python's string methods, `raise_exception`, `strftime_now` and a `tojson` that does not escape HTML.

use std::fmt;
use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value as Jinja};
use minijinja::{AutoEscape, Environment, Error, ErrorKind};
use serde_json::{Map, Value};

use super::{date, python_json};
use crate::model_files::{ModelFileError, json, read};

const NAME: &str = "chat_template";

/// One message as the template sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user` or `assistant`. `developer` is read as `system`, which is what templates know.
    pub role: &'static str,
    /// Text; parts are joined by a line break.
    pub content: String,
    /// Name of the speaker, if given.
    pub name: Option<String>,
}

/// Why a conversation was not rendered.
#[derive(Debug, thiserror::Error)]
#[error("the chat template refused the messages: {0}")]
pub struct TemplateError(String);

/// A compiled template with the special tokens it may name.
pub struct ChatTemplate {
    environment: Environment<'static>,
    special: Vec<(String, String)>,
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatTemplate")
            .field("special", &self.special)
            .finish_non_exhaustive()
    }
}

impl ChatTemplate {
    /// Compiles `source`; `special` are (name, text) such as `("eos_token", "</s>")`.
    ///
    /// # Errors
    /// The template's syntax error.
    pub fn compile(source: &str, special: Vec<(String, String)>) -> Result<Self, String> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .map_err(|error| error.to_string())?;
        environment.set_syntax(syntax);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| {
            Err::<Jinja, _>(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_filter("tojson", tojson);
        environment
            .add_template_owned(NAME, without_generation_tags(source))
            .map_err(|error| format!("{error:#}"))?;
        Ok(Self {
            environment,
            special,
        })
    }

    /// Renders a conversation.
    ///
    /// # Errors
    /// What the template raised, or why it failed.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        variables: &Map<String, Value>,
        now: u64,
    ) -> Result<String, TemplateError> {
        let mut context: Vec<(String, Jinja)> = self
            .special
            .iter()
            .map(|(name, text)| (name.clone(), Jinja::from(text)))
            .collect();
        context.extend(
            variables
                .iter()
                .map(|(name, value)| (name.clone(), jinja(value))),
        );
        context.push(("messages".into(), messages.iter().map(message).collect()));
        context.push(("add_generation_prompt".into(), add_generation_prompt.into()));
        context.push((
            "strftime_now".into(),
            Jinja::from_function(move |format: String| {
                date::strftime(&format, now)
                    .map_err(|what| Error::new(ErrorKind::InvalidOperation, what))
            }),
        ));
        self.environment
            .get_template(NAME)
            .and_then(|template| template.render(Jinja::from_pairs(context)))
            .map_err(|error| TemplateError(plain(&error)))
    }
}

/// The message of an error without its position, if the template itself raised it.
fn plain(error: &Error) -> String {
    match error.detail() {
        Some(detail) => detail.to_owned(),
        None => error.to_string(),
    }
}

fn message(message: &Message) -> Jinja {
    let mut pairs = vec![
        ("role", Jinja::from(message.role)),
        ("content", Jinja::from(&message.content)),
    ];
    if let Some(name) = &message.name {
        pairs.push(("name", Jinja::from(name)));
    }
    Jinja::from_pairs(pairs)
}

/// A JSON value as a template's value.
fn jinja(value: &Value) -> Jinja {
    match value {
        Value::Null => Jinja::from(()),
        Value::Bool(flag) => Jinja::from(*flag),
        Value::String(text) => Jinja::from(text),
        Value::Array(list) => list.iter().map(jinja).collect(),
        Value::Object(map) => {
            Jinja::from_pairs(map.iter().map(|(key, value)| (key.clone(), jinja(value))))
        }
        Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(whole), _) => Jinja::from(whole),
            (None, Some(whole)) => Jinja::from(whole),
            (None, None) => Jinja::from(number.as_f64().unwrap_or(f64::NAN)),
        },
    }
}

#[expect(clippy::needless_pass_by_value, reason = "the signature of a filter")]
fn tojson(value: &Jinja, indent: Option<usize>, options: Kwargs) -> Result<String, Error> {
    let indent = match indent {
        Some(width) => Some(width),
        None => options.get::<Option<usize>>("indent")?,
    };
    // Accepted because templates pass it; text stays as it is in any case.
    let _ascii: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    python_json::dumps(value, indent)
}

/// `{% generation %}` marks the assistant's text for training; for serving it is an empty block.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else {
            break;
        };
        let end = start + length + 2;
        let tag = &rest[start..end];
        let word = tag
            .trim_start_matches("{%")
            .trim_end_matches("%}")
            .trim_matches(['-', '+'])
            .trim();
        out.push_str(&rest[..start]);
        match word {
            "generation" => out.push_str(&tag.replacen("generation", "if true", 1)),
            "endgeneration" => out.push_str(&tag.replacen("endgeneration", "endif", 1)),
            _ => out.push_str(tag),
        }
        rest = &rest[end..];
    }
    out.push_str(rest);
    out
}

/// Finds the template of a model directory. `chat_template.jinja` wins, as in transformers; then
/// `chat_template.json`, which processors had before it, then `tokenizer_config.json`. The latter two have a
/// string, or a list of named templates of which only `default` is for a plain conversation.
pub(super) fn load(dir: &Path) -> Result<Option<ChatTemplate>, ModelFileError> {
    let config_path = dir.join("tokenizer_config.json");
    let config = json(&config_path)?.unwrap_or(Value::Null);
    let special_map = json(&dir.join("special_tokens_map.json"))?.unwrap_or(Value::Null);
    let jinja_path = dir.join("chat_template.jinja");
    let json_path = dir.join("chat_template.json");
    let (path, source) = if let Some(bytes) = read(&jinja_path)? {
        let text = String::from_utf8(bytes)
            .map_err(|error| ModelFileError::parse(&jinja_path, error.to_string()))?;
        (jinja_path, Some(text))
    } else if let Some(document) = json(&json_path)? {
        let source = source(&document["chat_template"]);
        (json_path, source)
    } else {
        (config_path, source(&config["chat_template"]))
    };
    source
        .map(|text| {
            ChatTemplate::compile(&text, special(&special_map, &config))
                .map_err(|what| ModelFileError::parse(&path, what))
        })
        .transpose()
}

fn source(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Array(named) => named
            .iter()
            .find(|entry| entry["name"] == "default")
            .and_then(|entry| entry["template"].as_str())
            .map(str::to_owned),
        _ => None,
    }
}

/// `bos_token` and its kind, from both files; a token is a string or an object with `content`.
fn special(map: &Value, config: &Value) -> Vec<(String, String)> {
    [
        "bos_token",
        "eos_token",
        "unk_token",
        "pad_token",
        "sep_token",
        "cls_token",
        "mask_token",
    ]
    .into_iter()
    .filter_map(|name| {
        let text = |value: &Value| {
            value
                .as_str()
                .or_else(|| value["content"].as_str())
                .map(str::to_owned)
        };
        let text = text(&config[name]).or_else(|| text(&map[name]))?;
        Some((name.to_owned(), text))
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn say(role: &'static str, content: &str) -> Message {
        Message {
            role,
            content: content.into(),
            name: None,
        }
    }

    fn render(source: &str, messages: &[Message]) -> Result<String, TemplateError> {
        let special = vec![("bos_token".into(), "<s>".into())];
        let template = ChatTemplate::compile(source, special).unwrap();
        template.render(messages, true, &Map::new(), 0)
    }

    /// The idiom of the Qwen family: block trimming, `loop.first`, message fields by index.
    #[test]
    fn chatml_with_trimmed_blocks() {
        let source = "{% for message in messages %}\n    {% if loop.first and messages[0]['role'] != 'system' %}\n{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}\n    {% endif %}\n{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}\n{% endfor %}\n{% if add_generation_prompt %}\n{{ '<|im_start|>assistant\\n' }}\n{% endif %}";
        assert_eq!(
            render(source, &[say("user", "Hi <b>")]).unwrap(),
            "<|im_start|>system\nYou help.<|im_end|>\n\n<|im_start|>user\nHi <b><|im_end|>\n\n<|im_start|>assistant\n\n"
        );
    }

    #[test]
    fn what_templates_lean_on() {
        assert_eq!(
            render(
                "{{ bos_token }}{{ messages[0].content.strip().upper() }}",
                &[say("user", " a ")]
            )
            .unwrap(),
            "<s>A"
        );
        assert_eq!(
            render(
                "{{ {'a': [1, '<']} | tojson }}{{ strftime_now('%Y') }}",
                &[say("user", "")]
            )
            .unwrap(),
            "{\"a\": [1, \"<\"]}1970"
        );
        assert_eq!(
            render(
                "{%- generation -%} x {%- endgeneration %}",
                &[say("user", "")]
            )
            .unwrap(),
            "x"
        );
        let split = "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content.split('|')[-1] }}{% endfor %}";
        assert_eq!(
            render(split, &[say("system", "s"), say("user", "a|b")]).unwrap(),
            "b"
        );
    }

    #[test]
    fn a_template_may_refuse() {
        let error = render(
            "{{ raise_exception('roles must alternate') }}",
            &[say("user", "")],
        )
        .unwrap_err();
        assert!(
            error.to_string().ends_with("roles must alternate"),
            "{error}"
        );
    }

    #[test]
    fn variables_of_the_client_reach_it() {
        let template = ChatTemplate::compile("{{ enable_thinking }}", Vec::new()).unwrap();
        let mut variables = Map::new();
        variables.insert("enable_thinking".into(), Value::Bool(false));
        let text = template.render(&[], true, &variables, 0).unwrap();
        assert!(text.eq_ignore_ascii_case("false"), "{text}");
    }

    #[test]
    fn templates_are_found_in_every_place() {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("tokenizer_config.json");
        assert!(load(dir.path()).unwrap().is_none());
        std::fs::write(
            &config,
            r#"{"chat_template": [{"name": "tool_use", "template": "t"}]}"#,
        )
        .unwrap();
        assert!(
            load(dir.path()).unwrap().is_none(),
            "a template for tools is not one for conversations"
        );
        std::fs::write(
            &config,
            r#"{"eos_token": {"content": "</s>"}, "chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d{{ eos_token }}"}]}"#,
        )
        .unwrap();
        let named = load(dir.path()).unwrap().unwrap();
        assert_eq!(named.render(&[], false, &Map::new(), 0).unwrap(), "d</s>");
        let legacy = dir.path().join("chat_template.json");
        std::fs::write(legacy, r#"{"chat_template": "json"}"#).unwrap();
        let json = load(dir.path()).unwrap().unwrap();
        assert_eq!(json.render(&[], false, &Map::new(), 0).unwrap(), "json");
        std::fs::write(dir.path().join("chat_template.jinja"), "file").unwrap();
        let file = load(dir.path()).unwrap().unwrap();
        assert_eq!(file.render(&[], false, &Map::new(), 0).unwrap(), "file");
        std::fs::write(dir.path().join("chat_template.jinja"), "{% if %}").unwrap();
        assert!(
            load(dir.path())
                .unwrap_err()
                .to_string()
                .contains("chat_template.jinja")
        );
    }
}

//! Types → the schema that Kubernetes takes, and the definition around it.
//!
//! Kubernetes wants a *structural* schema: no references, no nulls as a type, no closed objects. `kube` brings most of it
//! about; what is left is done here.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceColumnDefinition, CustomResourceDefinition, CustomResourceDefinitionNames,
    CustomResourceDefinitionSpec, CustomResourceDefinitionVersion,
    CustomResourceSubresourceScale, CustomResourceSubresourceStatus,
    CustomResourceSubresources, CustomResourceValidation, JSONSchemaProps,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::core::schema::{OptionalEnum, OptionalIntOrString, StructuralSchemaRewriter};
use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use schemars::transform::AddNullable;
use serde_json::{Map, Value, json};

use crate::{CATEGORY, GROUP, VERSION};

/// Why a definition cannot be made. All of it is known when this crate is built, so a test is enough.
#[derive(Debug, thiserror::Error)]
pub enum SchemaError {
    /// A rule or limit names a field that there is not.
    #[error("the schema has no field {0}")]
    NoField(String),
    /// What was generated is no schema of Kubernetes.
    #[error("the schema is none of Kubernetes: {0}")]
    Form(#[from] serde_json::Error),
}

/// What a definition says beside its schema.
#[derive(Debug)]
pub(crate) struct Kind {
    pub(crate) kind: &'static str,
    pub(crate) plural: &'static str,
    pub(crate) singular: &'static str,
    pub(crate) short: &'static str,
    pub(crate) columns: Vec<CustomResourceColumnDefinition>,
    pub(crate) scale: Option<CustomResourceSubresourceScale>,
}

/// The schema of a resource, `spec` and `status` as its properties.
pub(crate) fn generate<T: JsonSchema>() -> Result<Value, SchemaError> {
    let generator = SchemaSettings::openapi3()
        .with(|settings| {
            settings.inline_subschemas = true;
            settings.meta_schema = None;
        })
        .with_transform(AddNullable::default())
        .with_transform(StructuralSchemaRewriter)
        .with_transform(OptionalEnum)
        .with_transform(OptionalIntOrString)
        .into_generator();
    let mut object = serde_json::to_value(generator.into_root_schema_for::<T>())?;
    tidy(&mut object);
    let required = json!(["metadata", "spec"]);
    if let Some(map) = object.as_object_mut() {
        map.remove("title");
        map.insert("required".to_owned(), required);
    }
    Ok(object)
}

/// Takes out what Kubernetes does not take or does not need: absent is absent, never null; objects are open, and what
/// they do not name is pruned; formats of unsigned numbers are unknown to it.
fn tidy(schema: &mut Value) {
    match schema {
        Value::Object(map) => {
            map.remove("nullable");
            if map.get("additionalProperties") == Some(&Value::Bool(false)) {
                map.remove("additionalProperties");
            }
            if map
                .get("format")
                .and_then(Value::as_str)
                .is_some_and(|f| f.starts_with("uint"))
            {
                map.remove("format");
            }
            // What serde takes for an absent list or map; the schema says nothing by it.
            if map.get("default").is_some_and(is_empty) {
                map.remove("default");
            }
            if let Some(Value::String(text)) = map.get_mut("description") {
                *text = one_line(text);
            }
            map.values_mut().for_each(tidy);
        }
        Value::Array(values) => values.iter_mut().for_each(tidy),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(values) => values.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::String(text) => text.is_empty(),
        Value::Bool(_) | Value::Number(_) => false,
    }
}

/// Docs break lines where the source does; readers of a schema want paragraphs.
fn one_line(text: &str) -> String {
    let paragraphs = text
        .split("\n\n")
        .map(|p| p.split_whitespace().collect::<Vec<_>>().join(" "));
    paragraphs.collect::<Vec<_>>().join("\n\n")
}

/// The schema of the field at a path such as `spec.workers.count`; `spec.x[]` is the schema of a list's entries.
pub(crate) fn field<'a>(
    object: &'a mut Value,
    path: &str,
) -> Result<&'a mut Map<String, Value>, SchemaError> {
    let missing = || SchemaError::NoField(path.to_owned());
    let mut at = object;
    for step in path.split('.').filter(|step| !step.is_empty()) {
        let (name, entries) = match step.strip_suffix("[]") {
            Some(name) => (name, true),
            None => (step, false),
        };
        let pointer = if entries {
            format!("/properties/{name}/items")
        } else {
            format!("/properties/{name}")
        };
        at = at.pointer_mut(&pointer).ok_or_else(missing)?;
    }
    at.as_object_mut().ok_or_else(missing)
}

pub(crate) fn column(
    name: &str,
    type_: &str,
    path: &str,
    priority: i32,
) -> CustomResourceColumnDefinition {
    CustomResourceColumnDefinition {
        name: name.to_owned(),
        type_: type_.to_owned(),
        json_path: path.to_owned(),
        priority: (priority > 0).then_some(priority),
        ..CustomResourceColumnDefinition::default()
    }
}

pub(crate) fn definition(
    kind: Kind,
    object: Value,
) -> Result<CustomResourceDefinition, SchemaError> {
    let schema: JSONSchemaProps = serde_json::from_value(object)?;
    let version = CustomResourceDefinitionVersion {
        name: VERSION.to_owned(),
        served: true,
        storage: true,
        schema: Some(CustomResourceValidation {
            open_api_v3_schema: Some(schema),
        }),
        subresources: Some(CustomResourceSubresources {
            status: Some(CustomResourceSubresourceStatus(json!({}))),
            scale: kind.scale,
        }),
        additional_printer_columns: Some(kind.columns),
        ..CustomResourceDefinitionVersion::default()
    };
    Ok(CustomResourceDefinition {
        metadata: ObjectMeta {
            name: Some(format!("{}.{GROUP}", kind.plural)),
            ..ObjectMeta::default()
        },
        spec: CustomResourceDefinitionSpec {
            group: GROUP.to_owned(),
            scope: "Namespaced".to_owned(),
            names: CustomResourceDefinitionNames {
                kind: kind.kind.to_owned(),
                plural: kind.plural.to_owned(),
                singular: Some(kind.singular.to_owned()),
                short_names: Some(vec![kind.short.to_owned()]),
                categories: Some(vec![CATEGORY.to_owned()]),
                list_kind: Some(format!("{}List", kind.kind)),
            },
            versions: vec![version],
            ..CustomResourceDefinitionSpec::default()
        },
        status: None,
    })
}

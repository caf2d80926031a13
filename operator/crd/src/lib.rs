//! `foregate-crd`: the custom resources of group `foregate.dev`.
//!
//! In: the vocabulary of [`foregate_api::manifest`], which `foregate up -f` reads too. Out: the types that clients of the
//! Kubernetes API use, and the definitions that are installed in a cluster ([`definitions`]): schema with docs,
//! defaults and ranges, rules in CEL, printer columns, the scale subresource.
//! Invariants: nothing here talks to anybody; a default or range stands in [`foregate_api::limits`] once; what a rule
//! refuses, the operator's validation refuses too.
//! Start reading at [`cluster`], then [`mod@rules`].
#![forbid(unsafe_code)]

pub mod cluster;
pub mod conditions;
pub mod placement;
pub mod rules;
pub mod schema;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;

pub use cluster::{MoeCluster, MoeClusterStatus};
pub use conditions::{ConditionType, Reason};
pub use placement::{ExpertPlacement, ExpertPlacementSpec, ExpertPlacementStatus};
pub use schema::SchemaError;

/// API group of all resources.
pub const GROUP: &str = "foregate.dev";
/// The version that is served and stored.
pub const VERSION: &str = "v1alpha1";
/// Category of all resources: `kubectl get foregate`.
pub const CATEGORY: &str = "foregate";

/// All definitions, in the order in which they are installed.
///
/// # Errors
/// If a schema does not have a field that rules or limits name.
pub fn definitions() -> Result<Vec<CustomResourceDefinition>, SchemaError> {
    Ok(vec![cluster::definition()?, placement::definition()?])
}

/// Implements `kube::Resource` for a namespaced resource of [`GROUP`].
macro_rules! resource {
    ($name:ident, $plural:literal) => {
        impl kube::Resource for $name {
            type DynamicType = ();
            type Scope = kube::core::NamespaceResourceScope;

            fn kind((): &()) -> std::borrow::Cow<'_, str> {
                stringify!($name).into()
            }

            fn group((): &()) -> std::borrow::Cow<'_, str> {
                crate::GROUP.into()
            }

            fn version((): &()) -> std::borrow::Cow<'_, str> {
                crate::VERSION.into()
            }

            fn plural((): &()) -> std::borrow::Cow<'_, str> {
                $plural.into()
            }

            fn meta(&self) -> &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta {
                &self.metadata
            }

            fn meta_mut(
                &mut self,
            ) -> &mut k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta {
                &mut self.metadata
            }
        }

        impl $name {
            /// `apiVersion` and `kind`, as objects carry them.
            #[must_use]
            pub fn types() -> kube::core::TypeMeta {
                kube::core::TypeMeta::resource::<Self>()
            }
        }
    };
}
pub(crate) use resource;

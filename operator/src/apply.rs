//! Fourth step: the prepared objects, applied on the server's side; and what is not wanted any more, removed.

use std::collections::BTreeSet;

use foregate_crd::{ExpertPlacement, ExpertPlacementStatus, MoeCluster, MoeClusterStatus};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Service};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::core::ApiResource;
use kube::{Api, Client, ResourceExt as _};
use serde_json::json;

use crate::build::{MANAGER, Object, Owner, selector_text};

/// Applies every object. What others wrote into fields of ours is overwritten; their own fields stay.
///
/// # Errors
/// The API server's first.
pub(crate) async fn apply(
    client: &Client,
    owner: &Owner,
    objects: &[Object],
) -> Result<(), kube::Error> {
    let how = PatchParams::apply(MANAGER).force();
    for object in objects {
        let api: Api<DynamicObject> =
            Api::namespaced_with(client.clone(), &owner.namespace, &object.api);
        api.patch(&object.name, &how, &Patch::Apply(&object.body))
            .await?;
    }
    Ok(())
}

/// Kinds that a cluster may come to need no more.
fn prunable() -> [ApiResource; 6] {
    [
        ApiResource::erase::<ConfigMap>(&()),
        ApiResource::erase::<Service>(&()),
        ApiResource::erase::<Deployment>(&()),
        ApiResource::erase::<HorizontalPodAutoscaler>(&()),
        ApiResource::erase::<PodDisruptionBudget>(&()),
        ApiResource::erase::<NetworkPolicy>(&()),
    ]
}

/// Removes what this cluster owns and `objects` does not name; `keep` are names that are still in use.
///
/// # Errors
/// The API server's first.
pub(crate) async fn prune(
    client: &Client,
    owner: &Owner,
    objects: &[Object],
    keep: &BTreeSet<String>,
) -> Result<(), kube::Error> {
    let ours = ListParams::default().labels(&selector_text(&owner.all()));
    for kind in prunable() {
        let wanted: BTreeSet<&str> = objects
            .iter()
            .filter(|object| object.api.kind == kind.kind)
            .map(|object| object.name.as_str())
            .collect();
        let api: Api<DynamicObject> =
            Api::namespaced_with(client.clone(), &owner.namespace, &kind);
        for found in api.list_metadata(&ours).await?.items {
            let name = found.name_any();
            let owned = found.owner_references().iter().any(|r| r.uid == owner.uid);
            if owned && !wanted.contains(name.as_str()) && !keep.contains(&name) {
                gone(api.delete(&name, &DeleteParams::default()).await)?;
                tracing::info!(cluster = %owner.name, kind = %kind.kind, %name, "removed");
            }
        }
    }
    Ok(())
}

/// Makes a pod, unless there is one.
///
/// # Errors
/// The API server's.
pub(crate) async fn create(client: &Client, pod: &Pod) -> Result<(), kube::Error> {
    let namespace = pod.namespace().unwrap_or_default();
    let api: Api<Pod> = Api::namespaced(client.clone(), &namespace);
    let how = PostParams {
        field_manager: Some(MANAGER.to_owned()),
        ..PostParams::default()
    };
    match api.create(&how, pod).await {
        Err(kube::Error::Api(error)) if error.is_already_exists() => Ok(()),
        end => end.map(drop),
    }
}

/// Ends a pod, in its own time or at once. Nothing happens to another pod of the same name.
///
/// # Errors
/// The API server's.
pub(crate) async fn end(client: &Client, pod: &Pod, at_once: bool) -> Result<(), kube::Error> {
    let namespace = pod.namespace().unwrap_or_default();
    let api: Api<Pod> = Api::namespaced(client.clone(), &namespace);
    let mut how = DeleteParams::default();
    if at_once {
        how = how.grace_period(0);
    }
    if let Some(uid) = pod.uid() {
        how = how.preconditions(kube::api::Preconditions {
            uid: Some(uid),
            ..kube::api::Preconditions::default()
        });
    }
    gone(api.delete(&pod.name_any(), &how).await)
}

/// Writes a cluster's status.
///
/// # Errors
/// The API server's.
pub(crate) async fn write_status(
    client: &Client,
    owner: &Owner,
    status: &MoeClusterStatus,
) -> Result<(), kube::Error> {
    let api: Api<MoeCluster> = Api::namespaced(client.clone(), &owner.namespace);
    let types = MoeCluster::types();
    let body = json!({
        "apiVersion": types.api_version,
        "kind": types.kind,
        "status": status,
    });
    let how = PatchParams::apply(MANAGER).force();
    gone(
        api.patch_status(&owner.name, &how, &Patch::Apply(&body))
            .await,
    )
}

/// Writes a placement's status.
///
/// # Errors
/// The API server's.
pub(crate) async fn write_placement(
    client: &Client,
    owner: &Owner,
    status: &ExpertPlacementStatus,
) -> Result<(), kube::Error> {
    let api: Api<ExpertPlacement> = Api::namespaced(client.clone(), &owner.namespace);
    let types = ExpertPlacement::types();
    let body = json!({
        "apiVersion": types.api_version,
        "kind": types.kind,
        "status": status,
    });
    let how = PatchParams::apply(MANAGER).force();
    gone(
        api.patch_status(&owner.name, &how, &Patch::Apply(&body))
            .await,
    )
}

/// What is not there any more needs nothing done; another of its name is none of ours.
fn gone<T>(end: Result<T, kube::Error>) -> Result<(), kube::Error> {
    match end {
        Err(kube::Error::Api(error)) if error.is_not_found() || error.is_conflict() => Ok(()),
        end => end.map(drop),
    }
}

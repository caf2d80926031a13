//! Fourth step: the prepared objects, applied on the server's side; and what is not wanted any more, removed.

use std::collections::BTreeSet;

use foregate_crd::{ExpertPlacement, ExpertPlacementStatus, MoeCluster, MoeClusterStatus};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Service};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::core::{ApiResource, PartialObjectMeta, Status};
use kube::{Api, Client, ResourceExt as _};
use serde_json::json;

use crate::build::{MANAGER, Object, Owner, selector_text};

/// Why objects were not brought to what they shall be.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApplyError {
    /// The API server did not do it.
    #[error(transparent)]
    Api(#[from] kube::Error),
    /// An object of this name is somebody else's, and stays as it is.
    #[error(
        "{kind} {name} is there already and is not of this cluster: remove it, or give the MoeCluster another name (what is \
         left of an earlier cluster of this name goes by itself)"
    )]
    Taken {
        /// Its kind.
        kind: String,
        /// Its name.
        name: String,
    },
}

/// What a cluster owns of the kinds that it may come to need no more: kind and name.
pub(crate) type Owned = BTreeSet<(String, String)>;

/// Applies every object. What others wrote into fields of ours is overwritten, and their own fields stay; an object that is
/// not of this cluster is left alone. Since an apply that meets no field of ours would take it over in silence, who owns an
/// object that is not `owned` is asked first.
///
/// # Errors
/// The API server's first, or the first name that is taken.
pub(crate) async fn apply(
    client: &Client,
    owner: &Owner,
    objects: &[Object],
    owned: &Owned,
) -> Result<(), ApplyError> {
    let judged: BTreeSet<String> = prunable().into_iter().map(|kind| kind.kind).collect();
    for object in objects {
        let key = (object.api.kind.clone(), object.name.clone());
        let api: Api<DynamicObject> =
            Api::namespaced_with(client.clone(), &owner.namespace, &object.api);
        let ours = owned.contains(&key) || !judged.contains(&key.0);
        let whose = match ours {
            true => Whose::Ours,
            false => whose(&api, owner, &object.name).await?,
        };
        let taken = |(kind, name)| ApplyError::Taken { kind, name };
        let how = PatchParams::apply(MANAGER);
        let how = match whose {
            Whose::Ours => how.force(),
            Whose::Nobodys => how,
            Whose::Others => return Err(taken(key)),
        };
        let body = Patch::Apply(&object.body);
        match api.patch(&object.name, &how, &body).await {
            // Somebody was quicker.
            Err(kube::Error::Api(error)) if !how.force && is_taken(&error) => {
                return Err(taken(key));
            }
            end => drop(end?),
        }
    }
    Ok(())
}

/// Who owns an object.
enum Whose {
    /// There is none.
    Nobodys,
    /// This cluster, even if its labels are not ours any more.
    Ours,
    /// Somebody else, or nobody that it names.
    Others,
}

async fn whose(
    api: &Api<DynamicObject>,
    owner: &Owner,
    name: &str,
) -> Result<Whose, kube::Error> {
    let found = api.list_metadata(&named(name)).await?.items;
    Ok(match found.first() {
        None => Whose::Nobodys,
        Some(object) if owner.owns(object) => Whose::Ours,
        Some(_) => Whose::Others,
    })
}

/// The object of this name, if there is one: to list what is listed anyway asks for no further right.
fn named(name: &str) -> ListParams {
    ListParams::default().fields(&format!("metadata.name={name}"))
}

/// Somebody else has written what we would write, or another controller owns the object.
fn is_taken(error: &Status) -> bool {
    error.is_conflict() || (error.code == 422 && error.message.contains("ownerReferences"))
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

/// What this cluster owns.
///
/// # Errors
/// The API server's first.
pub(crate) async fn owned(client: &Client, owner: &Owner) -> Result<Owned, kube::Error> {
    let ours = ListParams::default().labels(&selector_text(&owner.all()));
    let mut owned = Owned::new();
    for kind in prunable() {
        let api: Api<DynamicObject> =
            Api::namespaced_with(client.clone(), &owner.namespace, &kind);
        let found = api.list_metadata(&ours).await?.items;
        let of_it = found.iter().filter(|object| owner.owns(*object));
        let names = of_it.map(|object| object.name_any());
        owned.extend(names.map(|name| (kind.kind.clone(), name)));
    }
    Ok(owned)
}

/// Removes what is `owned` and `objects` does not name; `keep` are names that are still in use.
///
/// # Errors
/// The API server's first.
pub(crate) async fn prune(
    client: &Client,
    owner: &Owner,
    objects: &[Object],
    keep: &BTreeSet<String>,
    owned: &Owned,
) -> Result<(), kube::Error> {
    let wanted: BTreeSet<(&str, &str)> = objects
        .iter()
        .map(|object| (object.api.kind.as_str(), object.name.as_str()))
        .collect();
    for kind in prunable() {
        let api: Api<DynamicObject> =
            Api::namespaced_with(client.clone(), &owner.namespace, &kind);
        for (_, name) in owned.iter().filter(|(of, _)| *of == kind.kind) {
            if !wanted.contains(&(&kind.kind, name)) && !keep.contains(name) {
                gone(api.delete(name, &DeleteParams::default()).await)?;
                tracing::info!(cluster = %owner.name, kind = %kind.kind, %name, "removed");
            }
        }
    }
    Ok(())
}

/// Makes a pod, unless there is one.
///
/// # Errors
/// The API server's, or that the name is taken.
pub(crate) async fn create(client: &Client, pod: &Pod) -> Result<(), ApplyError> {
    let namespace = pod.namespace().unwrap_or_default();
    let api: Api<Pod> = Api::namespaced(client.clone(), &namespace);
    let how = PostParams {
        field_manager: Some(MANAGER.to_owned()),
        ..PostParams::default()
    };
    match api.create(&how, pod).await {
        Err(kube::Error::Api(error)) if error.is_already_exists() => {}
        end => return Ok(end.map(drop)?),
    }
    let name = pod.name_any();
    let found = api.list_metadata(&named(&name)).await?.items;
    let kind = MoeCluster::types().kind;
    // That of an earlier cluster of this name goes with it.
    let passes = |object: &PartialObjectMeta<Pod>| {
        let mut owners = object.owner_references().iter();
        object.metadata.deletion_timestamp.is_some() || owners.any(|o| o.kind == kind)
    };
    match found.iter().all(passes) {
        true => Ok(()),
        false => Err(ApplyError::Taken {
            kind: "Pod".to_owned(),
            name,
        }),
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

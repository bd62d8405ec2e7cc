//! The API's description: OpenAPI 3.1 at `/openapi.json`, and a page to read it at `/docs`.
//!
//! Bodies are described by their types in `forkd_types::rest`, paths by one line each in [`operations`]; a test
//! holds those against the router's.

mod operation;
mod operations;

use std::collections::BTreeSet;
use std::sync::OnceLock;

use axum::http::{Method, header};
use axum::response::{Html, IntoResponse, Response};
use utoipa::openapi::path::{HttpMethod, PathItem};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{ComponentsBuilder, InfoBuilder, LicenseBuilder, OpenApi, OpenApiBuilder, PathsBuilder};

use crate::auth::scope;

/// What the API is, for whoever reads the document.
const ABOUT: &str = "Fork warmed Linux microVMs into running copies, branch them while they run, and talk to what runs in them.

With tokens, every path but `/healthz` and `/readyz` needs `Authorization: Bearer TOKEN`; what a token may do is its scope: `read`, `spawn` or `admin`. A POST that makes something may carry an `Idempotency-Key`: the same request under the same key is carried out once.";

/// The name of the one security scheme.
const BEARER: &str = "token";

/// Everything that the router routes, ports of guests excepted: what is behind those is the guests' own.
fn document() -> OpenApi {
    let mut components = ComponentsBuilder::new()
        .security_scheme(BEARER, SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build()));
    let mut paths = PathsBuilder::new();
    let mut known = BTreeSet::new();
    for mut operation in operations::all() {
        for (name, schema) in std::mem::take(&mut operation.schemas) {
            if known.insert(name.clone()) {
                components = components.schema(name, schema);
            }
        }
        let (method, path) = (operation.method.clone(), operation.path);
        let mut documented = operation.build();
        if !scope::OPEN.contains(&path) {
            let scope = scope::needed(&name(&method), Some(path));
            documented.security = Some(vec![SecurityRequirement::new(BEARER, [scope.to_string()])]);
        }
        paths = paths.path(path, PathItem::new(method, documented));
    }
    let licence = LicenseBuilder::new().name("Apache-2.0").identifier(Some("Apache-2.0")).build();
    let info = InfoBuilder::new()
        .title("forkd")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some(ABOUT))
        .license(Some(licence));
    OpenApiBuilder::new().info(info).paths(paths).components(Some(components.build())).build()
}

fn name(method: &HttpMethod) -> Method {
    match method {
        HttpMethod::Post => Method::POST,
        HttpMethod::Put => Method::PUT,
        HttpMethod::Delete => Method::DELETE,
        HttpMethod::Head => Method::HEAD,
        _ => Method::GET,
    }
}

/// `GET /openapi.json`.
pub(crate) async fn json() -> Response {
    static TEXT: OnceLock<String> = OnceLock::new();
    let text = TEXT.get_or_init(|| document().to_json().expect("the document is plain data"));
    ([(header::CONTENT_TYPE, "application/json")], text.as_str()).into_response()
}

/// `GET /docs`: the document as a page; it fetches nothing but `/openapi.json`.
pub(crate) async fn page() -> Html<&'static str> {
    Html(include_str!("page.html"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::Value;

    use super::*;

    /// Where the document is kept, so that a change of the API is seen as one.
    const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/openapi.json");

    #[test]
    fn every_route_is_described_and_nothing_else() {
        let described: BTreeSet<_> =
            operations::all().iter().map(|one| format!("{} {}", name(&one.method), one.path)).collect();
        let routed = scope::routes().into_iter().filter(|(_, path)| !path.contains("/ports/"));
        let itself = ["/openapi.json", "/docs"];
        let routed: BTreeSet<_> = routed
            .filter(|(_, path)| !itself.contains(&path.as_str()))
            .map(|(method, path)| format!("{method} {path}"))
            .collect();
        assert_eq!(described, routed);
    }

    #[test]
    fn the_document_is_the_one_in_the_documentation() {
        let text = document().to_pretty_json().expect("plain data") + "\n";
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::write(GOLDEN, &text).expect("it can be written");
        }
        let kept = std::fs::read_to_string(GOLDEN).unwrap_or_default();
        assert!(kept == text, "the API has changed: UPDATE_GOLDEN=1 cargo test -p forkd-api openapi");
    }

    #[test]
    fn every_reference_leads_somewhere_and_every_field_says_what_it_is() {
        let document: Value = serde_json::to_value(document()).expect("plain data");
        let schemas = document["components"]["schemas"].as_object().expect("there are schemas");
        let (mut dangling, mut silent) = (BTreeSet::new(), BTreeMap::new());
        walk(&document, &mut |value| {
            if let Some(to) = value.get("$ref").and_then(Value::as_str) {
                let name = to.rsplit('/').next().unwrap_or_default();
                if !schemas.contains_key(name) {
                    dangling.insert(name.to_owned());
                }
            }
        });
        for (name, schema) in schemas {
            let fields = schema["properties"].as_object().into_iter().flatten();
            // Of a field that may be null, the other choice says it.
            let undescribed = |field: &Value| {
                let choices = field["oneOf"].as_array().into_iter().flatten();
                std::iter::once(field).chain(choices).all(|one| one.get("description").is_none())
            };
            let fields: Vec<_> = fields.filter(|(_, field)| undescribed(field)).map(|(name, _)| name).collect();
            if !fields.is_empty() {
                silent.insert(name, fields);
            }
        }
        assert!(dangling.is_empty(), "{dangling:?}");
        assert!(silent.is_empty(), "{silent:?}");
    }

    fn walk(value: &Value, see: &mut impl FnMut(&Value)) {
        see(value);
        match value {
            Value::Array(items) => items.iter().for_each(|item| walk(item, see)),
            Value::Object(fields) => fields.values().for_each(|field| walk(field, see)),
            _ => {}
        }
    }
}

//! How one route is described: what it takes, what it answers.

use axum::http::StatusCode;
use utoipa::openapi::path::{HttpMethod, Operation as Documented, OperationBuilder, ParameterBuilder, ParameterIn};
use utoipa::openapi::request_body::RequestBodyBuilder;
use utoipa::openapi::schema::{ArrayBuilder, KnownFormat, ObjectBuilder, SchemaFormat, Type};
use utoipa::openapi::{ContentBuilder, Ref, RefOr, Required, ResponseBuilder, Schema};
use utoipa::{PartialSchema, ToSchema};

use forkd_types::rest::ErrorBody;
use forkd_types::{Digest, SandboxId, Tag};

/// The component schemas that a description refers to, by name.
pub(super) type Schemas = Vec<(String, RefOr<Schema>)>;

/// One method of one path.
pub(super) struct Operation {
    pub(super) method: HttpMethod,
    pub(super) path: &'static str,
    pub(super) schemas: Schemas,
    builder: OperationBuilder,
}

/// What a body is.
pub(super) enum Body {
    /// JSON of this schema.
    Json(RefOr<Schema>),
    /// Lines of JSON, each of this schema.
    JsonLines(RefOr<Schema>),
    /// Server-sent events whose data is JSON of this schema.
    Events(RefOr<Schema>),
    /// Text or bytes of this media type.
    Raw(&'static str),
}

/// What a query parameter is.
#[derive(Clone, Copy)]
pub(super) enum Query {
    /// `true` or `false`; false when absent.
    Flag,
    /// A text that must be there.
    Text,
    /// A text that may be left out.
    OptionalText,
    /// A whole number that may be left out.
    OptionalNumber,
}

impl Operation {
    fn new(method: HttpMethod, path: &'static str, summary: &str) -> Self {
        let builder =
            OperationBuilder::new().summary(Some(summary)).tag(tag(path)).operation_id(Some(id(&method, path)));
        let builder = segments(path).fold(builder, |builder, name| {
            builder.parameter(
                ParameterBuilder::new()
                    .name(name)
                    .parameter_in(ParameterIn::Path)
                    .required(Required::True)
                    .description(Some(meaning(name)))
                    .schema(Some(match name {
                        "port" => number(),
                        "id" => SandboxId::schema(),
                        "tag" => Tag::schema(),
                        "digest" => Digest::schema(),
                        _ => text(),
                    })),
            )
        });
        let mut operation = Self { method, path, schemas: Schemas::new(), builder };
        let error = operation.object::<ErrorBody>();
        let failure = ResponseBuilder::new().description("What went wrong, on which object, and what would be right.");
        operation.with(|builder| builder.response("default", failure.content(JSON, content(error)).build()))
    }

    pub(super) fn get(path: &'static str, summary: &str) -> Self {
        Self::new(HttpMethod::Get, path, summary)
    }

    pub(super) fn post(path: &'static str, summary: &str) -> Self {
        Self::new(HttpMethod::Post, path, summary)
    }

    pub(super) fn put(path: &'static str, summary: &str) -> Self {
        Self::new(HttpMethod::Put, path, summary)
    }

    pub(super) fn delete(path: &'static str, summary: &str) -> Self {
        Self::new(HttpMethod::Delete, path, summary)
    }

    pub(super) fn head(path: &'static str, summary: &str) -> Self {
        Self::new(HttpMethod::Head, path, summary)
    }

    /// More about it than fits a line.
    pub(super) fn about(self, text: &str) -> Self {
        self.with(|builder| builder.description(Some(text)))
    }

    /// A query parameter.
    pub(super) fn query(self, name: &str, kind: Query, meaning: &str) -> Self {
        let schema = match kind {
            Query::Flag => ObjectBuilder::new().schema_type(Type::Boolean).default(Some(false.into())).build().into(),
            Query::Text | Query::OptionalText => text(),
            Query::OptionalNumber => number(),
        };
        let required = if matches!(kind, Query::Text) { Required::True } else { Required::False };
        let parameter = ParameterBuilder::new()
            .name(name)
            .parameter_in(ParameterIn::Query)
            .required(required)
            .description(Some(meaning))
            .schema(Some(schema));
        self.with(|builder| builder.parameter(parameter))
    }

    /// A JSON body that must be there.
    pub(super) fn takes<T: ToSchema>(mut self) -> Self {
        let body = Body::Json(self.object::<T>());
        self.takes_raw(body)
    }

    /// Any body that must be there.
    pub(super) fn takes_raw(self, body: Body) -> Self {
        let (media_type, schema) = body.parts();
        let body =
            RequestBodyBuilder::new().required(Some(Required::True)).content(media_type, content(schema)).build();
        self.with(|builder| builder.request_body(Some(body)))
    }

    /// A JSON object as answer.
    pub(super) fn answers<T: ToSchema>(mut self, status: StatusCode) -> Self {
        let body = Body::Json(self.object::<T>());
        self.answers_raw(status, body)
    }

    /// A JSON array as answer.
    pub(super) fn answers_all<T: ToSchema>(mut self, status: StatusCode) -> Self {
        let items = self.object::<T>();
        self.answers_raw(status, Body::Json(Schema::from(ArrayBuilder::new().items(items)).into()))
    }

    /// Any answer.
    pub(super) fn answers_raw(self, status: StatusCode, body: Body) -> Self {
        let (media_type, schema) = body.parts();
        let response = ResponseBuilder::new().description(reason(status)).content(media_type, content(schema)).build();
        self.with(|builder| builder.response(status.as_str(), response))
    }

    /// An answer without a body.
    pub(super) fn answers_nothing(self, status: StatusCode) -> Self {
        let response = ResponseBuilder::new().description(reason(status)).build();
        self.with(|builder| builder.response(status.as_str(), response))
    }

    /// The reference to a named schema, which becomes a component with all that it refers to.
    pub(super) fn object<T: ToSchema>(&mut self) -> RefOr<Schema> {
        let name = T::name().into_owned();
        self.schemas.push((name.clone(), T::schema()));
        T::schemas(&mut self.schemas);
        RefOr::Ref(Ref::from_schema_name(name))
    }

    pub(super) fn build(self) -> Documented {
        self.builder.build()
    }

    fn with(self, change: impl FnOnce(OperationBuilder) -> OperationBuilder) -> Self {
        Self { builder: change(self.builder), ..self }
    }
}

const JSON: &str = "application/json";

impl Body {
    fn parts(self) -> (&'static str, RefOr<Schema>) {
        match self {
            Self::Json(schema) => (JSON, schema),
            Self::JsonLines(schema) => ("application/x-ndjson", schema),
            Self::Events(schema) => ("text/event-stream", schema),
            Self::Raw(media_type) if media_type.starts_with("text/") => (media_type, text()),
            Self::Raw(media_type) => {
                let bytes = SchemaFormat::KnownFormat(KnownFormat::Binary);
                (media_type, ObjectBuilder::new().schema_type(Type::String).format(Some(bytes)).build().into())
            }
        }
    }
}

fn content(schema: RefOr<Schema>) -> utoipa::openapi::Content {
    ContentBuilder::new().schema(Some(schema)).build()
}

fn text() -> RefOr<Schema> {
    String::schema()
}

fn number() -> RefOr<Schema> {
    u64::schema()
}

fn reason(status: StatusCode) -> &'static str {
    status.canonical_reason().unwrap_or_default()
}

/// The names of a path's variable segments.
fn segments(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter_map(|segment| segment.strip_prefix('{')?.strip_suffix('}'))
}

/// What a variable segment names.
fn meaning(segment: &str) -> &'static str {
    match segment {
        "id" => "A sandbox.",
        "tag" => "A snapshot.",
        "digest" => "A blob, `blake3:` and 64 hex digits.",
        "name" => "The name that it was given.",
        "port" => "A TCP port in the guest.",
        _ => "The rest of the path, as the server in the guest sees it.",
    }
}

/// The first segment that tells: `sandboxes` for all that is below it.
fn tag(path: &str) -> &str {
    path.trim_start_matches("/v1").split('/').find(|segment| !segment.is_empty()).unwrap_or("daemon")
}

/// A name for generated clients: `post_sandboxes_id_exec`.
fn id(method: &HttpMethod, path: &str) -> String {
    let method = match method {
        HttpMethod::Get => "get",
        HttpMethod::Post => "post",
        HttpMethod::Put => "put",
        HttpMethod::Delete => "delete",
        HttpMethod::Head => "head",
        _ => "other",
    };
    let words = path.trim_start_matches("/v1").split('/').filter(|segment| !segment.is_empty());
    words.fold(method.to_owned(), |id, word| id + "_" + word.trim_matches(['{', '}', '*']))
}

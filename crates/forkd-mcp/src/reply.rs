//! What a tool answers.

use rmcp::model::{CallToolResult, ContentBlock};
use serde::Serialize;
use serde_json::{Value, json};

use crate::{Body, CallError};

/// `arguments` as a request's body.
pub(crate) fn json_body(arguments: &impl Serialize) -> Body {
    Body::Json(serde_json::to_value(arguments).expect("arguments are plain data with text keys"))
}

/// The daemon's JSON as a tool's result, or its words as a tool's error. An empty answer is null.
pub(crate) fn json_result(answer: Result<Vec<u8>, CallError>) -> CallToolResult {
    let bytes = match answer {
        Ok(bytes) => bytes,
        Err(error) => return failure(&error),
    };
    if bytes.is_empty() {
        return value_result(Value::Null);
    }
    match serde_json::from_slice(&bytes) {
        Ok(value) => value_result(value),
        Err(error) => failure(&CallError(format!("the daemon's answer is not JSON: {error}"))),
    }
}

/// `value` as a tool's result. Structured content has to be an object, so that anything else is put into one.
pub(crate) fn value_result(value: Value) -> CallToolResult {
    let text = ContentBlock::text(value.to_string());
    let mut result = CallToolResult::success(vec![text]);
    result.structured_content = Some(if value.is_object() { value } else { json!({ "result": value }) });
    result
}

/// A tool's error.
pub(crate) fn failure(error: &CallError) -> CallToolResult {
    CallToolResult::error(vec![ContentBlock::text(error.to_string())])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_wrapped_and_errors_are_marked() {
        let listed = json_result(Ok(b"[1]".to_vec()));
        assert_eq!(listed.structured_content, Some(json!({"result": [1]})));
        assert_eq!(listed.is_error, Some(false));
        assert_eq!(json_result(Ok(b"{\"a\":1}".to_vec())).structured_content, Some(json!({"a": 1})));
        let failed = json_result(Err(CallError("sandbox sb-1 not found".to_owned())));
        assert_eq!(failed.is_error, Some(true));
        assert_eq!(json_result(Ok(b"<html>".to_vec())).is_error, Some(true));
    }
}

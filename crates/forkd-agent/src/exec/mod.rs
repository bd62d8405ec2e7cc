//! Running programs for clients.
//!
//! [`start`] turns a request into a running program, [`session::Session`] carries its streams until it ends.
//!
//! When the program has ended, its answer waits until both output streams end, but not for longer
//! than a short grace: a background process that it left behind may hold them open for ever. What is
//! in the pipes by then is still delivered; what the background process writes later is read and
//! dropped by [`discard`], so it neither blocks nor dies of a closed pipe.

pub mod discard;
mod frame_buffer;
mod session;

use std::path::Path;

use forkd_proto::agent::{Exec, Failure, FailureCode, Response};
use forkd_proto::frame::FrameError;

use crate::agent::Agent;
use crate::connection::Connection;
use crate::environment::{LookupError, find_program};
use crate::failure;
use crate::reaper::ExitWatch;
use crate::spawn::{self, Ends, Program, Streams};
use crate::users::{self, User, UserError};

/// Runs the program that `request` describes, with its streams on `connection`.
pub fn serve(agent: &Agent, connection: Connection, request: &Exec) -> Result<(), FrameError> {
    match start(agent, request) {
        Ok((watch, ends)) => {
            let session = session::Session::new(connection, watch, ends, request, agent);
            session.run()
        }
        Err(failure) => {
            let told = connection.respond(&Response::Error(failure));
            // The client may be sending standard input already.
            connection.close_gently();
            told
        }
    }
}

/// Starts the program that `request` describes.
fn start(agent: &Agent, request: &Exec) -> Result<(ExitWatch, Ends), Failure> {
    let name = request.args.first().ok_or_else(|| failure::invalid("exec: args is empty, it must name a program"))?;
    let user = request.user.as_deref().map(users::find).transpose().map_err(|error| user_failure(name, error))?;
    let mut environment = agent.environment.with(&additions(user.as_ref(), &request.env)?);
    if request.terminal.is_some() {
        environment.entry("TERM".to_owned()).or_insert_with(|| "xterm-256color".to_owned());
    }
    let directory = request.cwd.as_deref().unwrap_or("/");
    if !Path::new(directory).is_absolute() {
        return Err(failure::invalid(format!(
            "cannot run {name:?}: the working directory {directory:?} is not absolute"
        )));
    }
    if !Path::new(directory).is_dir() {
        return Err(failure::not_found(format!(
            "cannot run {name:?}: the working directory {directory:?} does not exist or is not a directory"
        )));
    }
    let search_path = environment.get("PATH").map_or("", String::as_str);
    let path = find_program(name, search_path, Path::new(directory)).map_err(|error| Failure {
        code: match error {
            LookupError::NotExecutable(_) => FailureCode::Denied,
            LookupError::NotInPath { .. } | LookupError::Missing(_) => FailureCode::NotFound,
        },
        message: format!("cannot run {name:?}: {error}"),
    })?;
    let program = Program {
        args: request.args.clone(),
        environment,
        directory: directory.into(),
        credentials: user.map(|user| user.credentials),
        streams: request.terminal.map_or(Streams::Pipes { input: request.stdin }, Streams::Terminal),
        keeps: Vec::new(),
        path: path.clone(),
    };
    spawn::start(&agent.reaper, program).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => failure::not_found(format!(
            "cannot run {}: the file is there, but the interpreter or program loader that it names is not",
            path.display()
        )),
        _ => failure::from_io(format_args!("cannot run {}", path.display()), &error),
    })
}

fn user_failure(name: &str, error: UserError) -> Failure {
    let code = match error {
        UserError::NoUser { .. } | UserError::NoGroup { .. } => FailureCode::NotFound,
        UserError::Read { .. } => FailureCode::Internal,
    };
    Failure { code, message: format!("cannot run {name:?}: {}", failure::with_causes(&error)) }
}

/// What a request adds to the base environment: the user's own variables, then its `env`.
fn additions(user: Option<&User>, env: &[(String, String)]) -> Result<Vec<(String, String)>, Failure> {
    let mut added = Vec::new();
    if let Some(user) = user {
        added.push(("HOME".to_owned(), user.home.clone()));
        for (variable, value) in [("USER", &user.name), ("LOGNAME", &user.name), ("SHELL", &user.shell)] {
            added.extend(value.iter().map(|value| (variable.to_owned(), value.clone())));
        }
    }
    for (name, value) in env {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            return Err(failure::invalid(format!(
                "exec: {name:?} cannot be an environment variable: the name must not be empty or hold '=', and neither \
                 name nor value may hold a zero byte"
            )));
        }
        added.push((name.clone(), value.clone()));
    }
    Ok(added)
}

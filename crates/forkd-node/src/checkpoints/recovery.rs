//! Finding checkpoints again after a restart.

use std::sync::Arc;

use super::Checkpoints;
use super::line::{Checkpoint, Held};
use crate::adoption::shake_hands;
use crate::database::checkpoints::{CheckpointRecord, Place};
use crate::error::NodeResult;
use crate::frozen::Frozen;
use crate::host::blocking;
use crate::process::Process;

impl Checkpoints {
    /// Takes in the checkpoints on record whose sandbox is known and that are still there; the rest is cleared.
    /// Returns the names of the run files of those in memory.
    pub(crate) async fn adopt_all(&self, rebooted: bool) -> NodeResult<Vec<String>> {
        let mut names = Vec::new();
        for record in self.host.database.checkpoints().await? {
            let known = self.roster.get(&record.sandbox).is_ok();
            match self.adopt(&record, known, rebooted).await {
                Ok(held) => {
                    if let Held::Frozen(frozen) = &held {
                        names.push(frozen.name().to_owned());
                    }
                    let CheckpointRecord { name, created_at_unix, pause_us, disks, automatic, base, .. } = record;
                    let point = Checkpoint { name, created_at_unix, pause_us, disks, automatic, base, held };
                    self.lines().entry(record.sandbox).or_default().points.push(point);
                }
                Err(reason) => {
                    tracing::warn!(sandbox = %record.sandbox, checkpoint = record.name, reason, "a checkpoint is lost");
                    self.host.database.forget_checkpoint(record.sandbox, record.name);
                }
            }
        }
        Ok(names)
    }

    async fn adopt(&self, record: &CheckpointRecord, known: bool, rebooted: bool) -> Result<Held, String> {
        match &record.place {
            Place::Memory(key, name) => {
                if rebooted {
                    return Err("it ended with the host's previous boot".to_owned());
                }
                let process = Process::find(*key).map_err(|_| "its process has ended".to_owned())?;
                if !known {
                    process.kill();
                    return Err("its sandbox is gone".to_owned());
                }
                match shake_hands(&self.host, name, key.pid).await {
                    Ok(control) => {
                        let about = (record.disks, record.pause_us);
                        let frozen = Frozen::adopted(&self.host, (control, process), name.clone(), about);
                        Ok(Held::Frozen(Arc::new(frozen)))
                    }
                    Err(reason) => {
                        process.kill();
                        Err(reason)
                    }
                }
            }
            Place::Disk(snapshot) => {
                if !known {
                    return Err("its sandbox is gone".to_owned());
                }
                let (store, tag) = (self.host.store.clone(), snapshot.tag.clone());
                let found = blocking("reading a checkpoint", move || store.get(&tag)).await;
                match found.map_err(|error| error.to_string())? {
                    Ok(found) if found.digest == snapshot.digest => Ok(Held::Snapshot(snapshot.clone())),
                    Ok(_) => Err("its snapshot is another one".to_owned()),
                    Err(error) => Err(error.to_string()),
                }
            }
        }
    }
}

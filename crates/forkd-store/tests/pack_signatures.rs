//! Who made a pack: keys and signatures that OpenSSL makes and checks too.

mod pack_support;

use std::path::{Path, PathBuf};
use std::process::Command;

use forkd_store::pack::{KeyError, PackError, SigningKey, UnpackOptions, VerifyingKey, sign};
use pack_support::*;

// Made for these tests: openssl genpkey -algorithm ed25519; openssl pkey -pubout
const PRIVATE: &str = "-----BEGIN PRIVATE KEY-----\n\
                       MC4CAQAwBQYDK2VwBCIEIMJJ/Sg6Ejt/3Kmsy2A4nugUUNHFOKIWoe+Q+Zn46CrF\n\
                       -----END PRIVATE KEY-----\n";
const PUBLIC: &str = "-----BEGIN PUBLIC KEY-----\n\
                      MCowBQYDK2VwAyEAru9SBEE3157luvPCbNsbuV7xD8SpGilrwxGYh8anEAk=\n\
                      -----END PUBLIC KEY-----\n";

struct Keys {
    dir: tempfile::TempDir,
    private: SigningKey,
    public: VerifyingKey,
}

impl Keys {
    fn read() -> Self {
        let dir = tempfile::tempdir().expect("tempdir");
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).expect("write");
            path
        };
        let private = SigningKey::read(&file("key.pem", PRIVATE)).expect("a private key");
        let public = VerifyingKey::read(&file("key.pub", PUBLIC)).expect("a public key");
        Self { dir, private, public }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

fn signed(pack: &[u8], key: &SigningKey) -> Vec<u8> {
    let mut signed = Vec::new();
    // Through a small buffer, so that frames and reads do not coincide.
    let manifest = sign(std::io::BufReader::with_capacity(100, pack), &mut signed, key).expect("sign");
    assert_eq!(manifest.tag, tag("two"));
    signed
}

fn only_by(key: &VerifyingKey) -> UnpackOptions {
    UnpackOptions { verify_key: Some(key.clone()), ..UnpackOptions::default() }
}

#[test]
fn a_signed_pack_is_taken_in_with_and_without_its_key() {
    let keys = Keys::read();
    assert_eq!(keys.private.verifying_key(), keys.public);
    let (_here, source) = chain_of_three();
    let plain = pack(&source, "two");
    let signed_pack = signed(&plain, &keys.private);
    for (options, verified) in [(UnpackOptions::default(), false), (only_by(&keys.public), true)] {
        let (_there, target) = store();
        assert_eq!(unpack_with(&target, &signed_pack, &options).expect("unpack").verified, verified);
        assert!(contents(&source) == contents(&target));
    }
    // Signing again changes nothing, and what is not the signature stays as it was.
    assert!(signed(&signed_pack, &keys.private) == signed_pack);
    assert_eq!(signed_pack[signed_pack.len() - 1000..], plain[plain.len() - 1000..]);
}

#[test]
fn what_is_not_signed_by_the_key_is_refused() {
    let keys = Keys::read();
    let (_here, source) = chain_of_three();
    let plain = pack(&source, "two");
    let signed_pack = signed(&plain, &keys.private);
    let refused = |pack: &[u8], key: &VerifyingKey| {
        let (_there, target) = store();
        let error = unpack_with(&target, pack, &only_by(key)).expect_err("refused");
        assert!(contents(&target).is_empty() && leftovers(&target) == 0);
        error
    };
    assert!(matches!(refused(&plain, &keys.public), PackError::Unsigned));
    let other = keys.path("other.pem");
    std::fs::write(&other, PRIVATE.replace("MJJ", "MJK")).expect("write");
    let other = SigningKey::read(&other).expect("another key");
    assert!(matches!(refused(&signed_pack, &other.verifying_key()), PackError::BadSignature));
    // Signed by another, signed anew by ours: the last one counts.
    let resigned = signed(&signed(&plain, &other), &keys.private);
    assert!(resigned == signed_pack);

    let mut members = Members::of(&signed_pack);
    members.edit_manifest(|json| json["description"] = "mine".into());
    assert!(matches!(refused(&members.pack(), &keys.public), PackError::BadSignature), "another manifest");
    let mut members = Members::of(&signed_pack);
    let at = members.position("manifest.sig");
    members.0[at].content[5] ^= 1;
    assert!(matches!(refused(&members.pack(), &keys.public), PackError::BadSignature), "another signature");
    let mut members = Members::of(&signed_pack);
    members.0[at].content.pop();
    members.0[at].resize();
    assert!(matches!(refused(&members.pack(), &keys.public), PackError::Unsigned), "half a signature");
    // What the signature does not cover directly, digests in the manifest do.
    let mut members = Members::of(&signed_pack);
    let last = members.0.len() - 1;
    members.0[last].content[700] ^= 1;
    assert!(matches!(refused(&members.pack(), &keys.public), PackError::Digest { .. }));
    // A signature that nobody asked for is no reason to take what is spoilt, nor a second one.
    let mut members = Members::of(&signed_pack);
    let twice = members.0[at].clone();
    members.0.insert(at, twice);
    let (_there, target) = store();
    assert!(matches!(unpack(&target, &members.pack()), Err(PackError::Duplicate { .. })));
}

#[test]
fn only_packs_are_signed() {
    let keys = Keys::read();
    for (bytes, pattern) in [
        (compress(&[0; 2048]), "begins with \"\""),
        (Members(vec![Member::new("README", b"x")]).pack(), "begins with \"README\""),
        (b"nonsense".to_vec(), "cannot be decompressed"),
        (Members::of(&pack(&chain_of_three().1, "two")).pack(), "frame of its own"),
    ] {
        let error = sign(bytes.as_slice(), Vec::new(), &keys.private).expect_err("no pack");
        assert!(error.to_string().contains(pattern), "{error}");
    }
}

#[test]
fn openssl_makes_the_keys_and_checks_the_signature() {
    let keys = Keys::read();
    let openssl = |words: &[&str]| {
        let output = Command::new("openssl").args(words).current_dir(keys.dir.path()).output().expect("run openssl");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    openssl(&["genpkey", "-algorithm", "ed25519", "-out", "new.pem"]);
    openssl(&["pkey", "-in", "new.pem", "-pubout", "-out", "new.pub"]);
    let private = SigningKey::read(&keys.path("new.pem")).expect("a private key");
    assert_eq!(private.verifying_key(), VerifyingKey::read(&keys.path("new.pub")).expect("a public key"));

    let packed = keys.path("pack");
    std::fs::write(&packed, signed(&pack(&chain_of_three().1, "two"), &private)).expect("write");
    let mut tar = Command::new("tar");
    tar.args(["--zstd", "-xf"]).arg(&packed).args(["manifest.json", "manifest.sig"]).current_dir(keys.dir.path());
    assert!(tar.status().expect("run tar").success());
    let check = ["pkeyutl", "-verify", "-pubin", "-inkey", "new.pub", "-rawin"];
    openssl(&[&check[..], &["-in", "manifest.json", "-sigfile", "manifest.sig"]].concat());
}

#[test]
fn files_that_are_no_keys_are_named_with_what_to_do() {
    let keys = Keys::read();
    let rsa = keys.path("rsa.pem");
    std::fs::write(&rsa, PRIVATE.replace("MC4CAQAwBQYDK2Vw", "MC4CAQAwBQYDK2Vx")).expect("write");
    for (path, says) in [(rsa, "openssl genpkey -algorithm ed25519"), (keys.path("key.pub"), "no ed25519 private key")]
    {
        let error = SigningKey::read(&path).expect_err("no private key");
        assert!(error.to_string().contains(says) && error.to_string().contains(&path.display().to_string()), "{error}");
    }
    let error = VerifyingKey::read(&keys.path("key.pem")).expect_err("no public key");
    assert!(error.to_string().contains("openssl pkey -in key.pem -pubout"), "{error}");
    assert!(matches!(VerifyingKey::read(Path::new("/none")), Err(KeyError::Unreadable { .. })));
    let hex = keys.public.to_hex();
    assert_eq!(VerifyingKey::from_hex(&hex).expect("what was written"), keys.public);
    for text in ["", "00", &hex[1..], &hex.to_uppercase()] {
        assert!(matches!(VerifyingKey::from_hex(text), Err(KeyError::NotHex { .. })), "{text}");
    }
}

//! Whom we speak to: verified by roots, or pinned. Never neither.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};
use rustls_platform_verifier::Verifier;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use snaptree_engine::operation::{Code, Failure};

/// Why a host is believed to be the one that is meant.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Trust {
    /// One of the system's roots vouches for its name.
    #[default]
    System,
    /// One of the certificates in this file vouches for its name, or is its own.
    Ca(PathBuf),
    /// Its certificate has this thumbprint; its name and dates do not matter then.
    Thumbprint(Thumbprint),
}

/// The SHA-256 of a certificate.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Thumbprint([u8; 32]);

impl Thumbprint {
    /// Of a certificate in DER.
    pub fn of(certificate: &[u8]) -> Self {
        Self(Sha256::digest(certificate).into())
    }
}

/// Upper-case hex with colons, as vSphere and `openssl x509 -fingerprint -sha256` print it.
impl fmt::Display for Thumbprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str(":")?;
            }
            write!(f, "{byte:02X}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Thumbprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is no thumbprint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a thumbprint is a SHA-256: 64 hex digits, with colons or without; this has {0} (a SHA-1 has 40, and is not enough)"
)]
pub struct ThumbprintError(usize);

impl FromStr for Thumbprint {
    type Err = ThumbprintError;
    fn from_str(text: &str) -> Result<Self, ThumbprintError> {
        let text = text.trim();
        let text = text.strip_prefix("sha256:").unwrap_or(text);
        let digits: Vec<u32> = text.chars().filter(|c| *c != ':').map_while(|c| c.to_digit(16)).collect();
        let others = text.chars().filter(|c| *c != ':').count() - digits.len();
        let mut bytes = [0; 32];
        if digits.len() != 64 || others > 0 {
            return Err(ThumbprintError(digits.len()));
        }
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks(2)) {
            *byte = u8::try_from(pair.iter().fold(0, |sum, digit| sum * 16 + digit)).unwrap_or_default();
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for Thumbprint {
    type Error = ThumbprintError;
    fn try_from(text: String) -> Result<Self, ThumbprintError> {
        text.parse()
    }
}

impl From<Thumbprint> for String {
    fn from(thumbprint: Thumbprint) -> Self {
        thumbprint.to_string()
    }
}

/// The certificate that a host showed last, also where it was not believed.
#[derive(Clone, Debug, Default)]
pub struct Shown(Arc<Mutex<Option<Thumbprint>>>);

impl Shown {
    /// Its thumbprint.
    pub fn thumbprint(&self) -> Option<Thumbprint> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The TLS that `trust` asks for.
///
/// # Errors
/// The file of certificates cannot be used.
pub fn config(trust: &Trust, shown: &Shown) -> Result<ClientConfig, Failure> {
    let provider = Arc::new(ring::default_provider());
    let ground = match trust {
        Trust::System => Ground::Vouched(Arc::new(
            Verifier::new(Arc::clone(&provider)).map_err(|error| unusable("the system's roots", &error))?,
        )),
        Trust::Ca(file) => vouched_by(file, &provider)?,
        Trust::Thumbprint(thumbprint) => Ground::Pinned(*thumbprint),
    };
    let judge = Judge { ground, shown: shown.clone(), provider: Arc::clone(&provider) };
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| unusable("TLS", &error))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(judge))
        .with_no_client_auth();
    Ok(config)
}

fn vouched_by(file: &Path, provider: &Arc<CryptoProvider>) -> Result<Ground, Failure> {
    let place = file.display().to_string();
    let mut roots = RootCertStore::empty();
    let mut own = Vec::new();
    for certificate in CertificateDer::pem_file_iter(file).map_err(|error| unusable(&place, &error))? {
        let certificate = certificate.map_err(|error| unusable(&place, &error))?;
        own.push(Thumbprint::of(&certificate));
        roots.add(certificate).map_err(|error| unusable(&place, &error))?;
    }
    if own.is_empty() {
        return Err(unusable(&place, &"it holds no certificate (PEM)"));
    }
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider))
        .build()
        .map_err(|error| unusable(&place, &error))?;
    Ok(Ground::VouchedOrOwn(verifier, own))
}

fn unusable(what: &str, error: &dyn fmt::Display) -> Failure {
    Failure::new(Code::Invalid, format!("{what} cannot be used to verify a host: {error}"))
}

#[derive(Debug)]
enum Ground {
    Vouched(Arc<dyn ServerCertVerifier>),
    /// ESX hosts sign their certificates themselves: such a one vouches for nothing but itself.
    VouchedOrOwn(Arc<WebPkiServerVerifier>, Vec<Thumbprint>),
    Pinned(Thumbprint),
}

#[derive(Debug)]
struct Judge {
    ground: Ground,
    shown: Shown,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Judge {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let thumbprint = Thumbprint::of(end_entity);
        *self.shown.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(thumbprint);
        match &self.ground {
            Ground::Vouched(verifier) => {
                verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
            }
            Ground::VouchedOrOwn(_, own) if own.contains(&thumbprint) => Ok(ServerCertVerified::assertion()),
            Ground::VouchedOrOwn(verifier, _) => {
                verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
            }
            Ground::Pinned(pinned) if *pinned == thumbprint => Ok(ServerCertVerified::assertion()),
            Ground::Pinned(_) => Err(Error::General("the certificate has another thumbprint".to_owned())),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thumbprint_is_read_as_openssl_and_vsphere_print_it() {
        let plain = "ab".repeat(32);
        let colons = vec!["AB"; 32].join(":");
        for text in [plain.clone(), colons.clone(), format!("sha256:{plain}"), format!(" {colons}\n")] {
            assert_eq!(text.parse::<Thumbprint>().unwrap().to_string(), colons);
        }
    }

    #[test]
    fn a_sha1_and_other_texts_are_no_thumbprints() {
        for text in ["", "ab", &"ab".repeat(20), &"ab".repeat(33), &format!("{}zz", "ab".repeat(32)), "éé"]
        {
            assert!(text.parse::<Thumbprint>().is_err(), "{text}");
        }
    }
}

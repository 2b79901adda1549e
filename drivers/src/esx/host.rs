//! A host, an ESXi or a vCenter: where it is, who we are there, and why it is believed to be it.

use std::net::IpAddr;

use async_trait::async_trait;
use reqwest::Url;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use snaptree_engine::HostName;
use snaptree_engine::driver::DriverError;
use snaptree_engine::operation::{Code, Failure};

use super::secret::PasswordSource;
use super::tls::Trust;

/// Longest address, in bytes.
const URL_BYTES_MAX: usize = 1_024;

/// What is kept in the log of a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct HostConfig {
    /// Where its SDK is: `https://HOST/sdk`.
    pub url: String,
    /// Who logs in.
    pub user: String,
    /// Where that one's password comes from.
    pub password: PasswordSource,
    /// Why it is believed to be it.
    #[serde(default)]
    pub trust: Trust,
}

impl HostConfig {
    /// Reads what the log keeps.
    ///
    /// # Errors
    /// It is of another shape.
    pub fn of(config: &Value) -> Result<Self, Failure> {
        Self::deserialize(config)
            .map_err(|error| Failure::new(Code::Invalid, format!("this is no esx host: {error}")))
    }

    /// As the log keeps it.
    ///
    /// # Errors
    /// None; the signature is serde's.
    pub fn to_value(&self) -> Result<Value, Failure> {
        serde_json::to_value(self).map_err(|error| Failure::new(Code::Invalid, error.to_string()))
    }

    /// The address, checked.
    ///
    /// # Errors
    /// It is none, holds a password, or would send the password in the clear over a network.
    pub fn address(&self) -> Result<Url, Failure> {
        let refused =
            |message: &str, hint: &str| Err(Failure::new(Code::Invalid, message).hint(hint).refused());
        if self.url.len() > URL_BYTES_MAX {
            return refused("the URL is too long", EXAMPLE);
        }
        // What is wrong with it is told without what it says: it may hold a password.
        let Ok(mut url) = Url::parse(&self.url) else {
            return refused("this is no URL", EXAMPLE);
        };
        if url.password().is_some() || !url.username().is_empty() {
            return refused(
                "the URL holds a user or a password",
                "give the user with --user, and the password with --password-file, --password-env or --password-command",
            );
        }
        match (url.scheme(), is_loopback(&url)) {
            ("https", _) | ("http", true) => {}
            ("http", false) => {
                return refused("http:// would send the password in the clear", "use https://");
            }
            _ => return refused("the URL does not begin with https://", EXAMPLE),
        }
        if url.host_str().is_none_or(str::is_empty) {
            return refused("the URL names no host", EXAMPLE);
        }
        if matches!(url.path(), "" | "/") {
            url.set_path("/sdk");
        }
        Ok(url)
    }
}

const EXAMPLE: &str = "for instance https://esx1.example.com/sdk";

fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Who knows the hosts: the log.
#[async_trait]
pub trait HostBook: Send + Sync {
    /// What is kept of the host of that name; none if there is none.
    ///
    /// # Errors
    /// The log cannot be read.
    async fn find(&self, host: &HostName) -> Result<Option<Value>, DriverError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(url: &str) -> Result<String, Failure> {
        let password = PasswordSource::Environment("P".to_owned());
        let host =
            HostConfig { url: url.to_owned(), user: "root".to_owned(), password, trust: Trust::System };
        host.address().map(|url| url.to_string())
    }

    #[test]
    fn an_address_is_https_or_stays_on_this_machine() {
        assert_eq!(at("https://esx1.example.com").unwrap(), "https://esx1.example.com/sdk");
        assert_eq!(at("https://[2001:db8::1]:8443/sdk").unwrap(), "https://[2001:db8::1]:8443/sdk");
        assert_eq!(at("http://127.0.0.1:8989/sdk").unwrap(), "http://127.0.0.1:8989/sdk");
        assert_eq!(at("http://[::1]:8989").unwrap(), "http://[::1]:8989/sdk");
        for url in
            ["http://esx1/sdk", "http://10.0.0.1/sdk", "http://127.0.0.1.evil.example/", "ftp://h/", "", "h"]
        {
            assert!(at(url).is_err(), "{url}");
        }
    }

    #[test]
    fn an_address_with_a_password_is_refused_and_not_repeated() {
        let failure = at("https://root:hunter2@esx1/sdk").unwrap_err();
        assert!(!format!("{failure:?}").contains("hunter2"), "{failure:?}");
    }
}

//! Which gossip topics a peer may subscribe to: those that this node was started with, and further ones whose
//! name begins as it was told (`Options::topic_prefix`), which it joins and leaves as it runs.
//!
//! Invariant: what is remembered of a peer's subscriptions is at most [`TOPICS_MAX`] names of
//! [`TOPIC_BYTES_MAX`] bytes.

use std::collections::HashSet;

use libp2p::gossipsub;

use crate::options::{SUBSCRIPTIONS_MAX, TOPIC_BYTES_MAX, TOPICS_MAX};

/// Topics that this node or a peer may take part in.
pub(crate) struct Ours {
    fixed: HashSet<gossipsub::TopicHash>,
    prefix: Option<String>,
}

pub(crate) type Filter = gossipsub::MaxCountSubscriptionFilter<Ours>;

/// The filter of a node with these topics.
pub(crate) fn filter(topics: &[gossipsub::IdentTopic], prefix: Option<String>) -> Filter {
    let fixed = topics.iter().map(gossipsub::IdentTopic::hash).collect();
    gossipsub::MaxCountSubscriptionFilter {
        filter: Ours { fixed, prefix },
        max_subscribed_topics: TOPICS_MAX,
        max_subscriptions_per_request: SUBSCRIPTIONS_MAX,
    }
}

impl gossipsub::TopicSubscriptionFilter for Ours {
    fn can_subscribe(&mut self, topic: &gossipsub::TopicHash) -> bool {
        let is_further = |prefix: &String| {
            topic.as_str().len() <= TOPIC_BYTES_MAX && topic.as_str().starts_with(prefix)
        };
        self.fixed.contains(topic) || self.prefix.as_ref().is_some_and(is_further)
    }
}

#[cfg(test)]
mod tests {
    use gossipsub::TopicSubscriptionFilter;

    use super::*;

    #[test]
    fn topics_are_those_given_and_short_ones_with_the_prefix() {
        let may = |prefix: Option<&str>, topic: &str| {
            let fixed = [gossipsub::IdentTopic::new("/swarm")];
            let mut filter = filter(&fixed, prefix.map(str::to_owned));
            filter.can_subscribe(&gossipsub::TopicHash::from_raw(topic))
        };
        assert!(may(None, "/swarm") && may(Some("/model/"), "/swarm"));
        assert!(may(Some("/model/"), "/model/1") && !may(None, "/model/1"));
        assert!(!may(Some("/model/"), "/other/1"));
        let long = format!("/model/{}", "1".repeat(TOPIC_BYTES_MAX));
        assert!(!may(Some("/model/"), &long));
    }
}

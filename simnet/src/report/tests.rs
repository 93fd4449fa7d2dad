//! A report of the smallest size: its figures can be read back, and its page has every section.

use serde_json::Value;

use super::{FIGURES, PAGE, Report, ReportOptions};

fn options(out: &std::path::Path) -> ReportOptions {
    ReportOptions {
        out: out.join("new"),
        seeds: 1,
        first_seed: 3,
        killed: vec![1, 3],
        sizes: vec![5, 10],
        large: false,
        jobs: None,
    }
}

#[test]
fn a_small_report_has_its_figures_and_every_section() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path());
    let report: Report = options.collect(|_| {});
    assert_eq!(report.violations(), [""; 0]);
    report.write(&options).unwrap();

    let figures = std::fs::read_to_string(options.out.join(FIGURES)).unwrap();
    let figures: Value = serde_json::from_str(&figures).unwrap();
    assert_eq!(figures["seeds"], serde_json::json!([3]));
    let killed = figures["killed"].as_array().unwrap();
    let counts: Vec<_> = killed.iter().map(|run| run["killed"].as_u64().unwrap()).collect();
    assert_eq!(counts, [1, 3]);
    for run in killed {
        let figure = |name: &str| run[name].as_f64().unwrap();
        assert!(figure("detect_s") > 0.0 && figure("heal_s") >= figure("detect_s"), "{run}");
        assert!(figure("moved_bytes") >= figure("least_bytes") && figure("lost") == 0.0, "{run}");
    }
    assert!(figures["busy"][0]["during"]["count"].as_u64().unwrap() > 0);
    let sizes: Vec<_> =
        figures["quiet"].as_array().unwrap().iter().map(|run| &run["nodes"]).collect();
    assert_eq!(sizes, [5, 10]);

    let page = std::fs::read_to_string(options.out.join(PAGE)).unwrap();
    for section in ["heal", "bytes", "load", "gossip", "traffic"] {
        assert!(page.contains(&format!("<section id=\"{section}\">")), "{section}");
    }
    assert_eq!(page.matches("<svg").count(), 10);
    assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
    assert!(page.contains(&report.command) && !page.contains("NaN") && !page.contains("inf"));
    for outside in ["http:", "https:", "src=", "@import", "<script"] {
        assert!(!page.contains(outside), "{outside}");
    }
}

#[test]
fn a_broken_rule_is_on_the_page() {
    let dir = tempfile::tempdir().unwrap();
    let options = ReportOptions { killed: Vec::new(), sizes: vec![5], ..options(dir.path()) };
    let mut report = options.collect(|_| {});
    report.quiet[0].violation = Some("lease: <node> 3".into());
    report.write(&options).unwrap();
    let page = std::fs::read_to_string(options.out.join(PAGE)).unwrap();
    assert!(page.contains("id=\"violations\"") && page.contains("lease: &lt;node&gt; 3"));
    assert!(!page.contains("id=\"heal\""), "there is nothing to show");
}

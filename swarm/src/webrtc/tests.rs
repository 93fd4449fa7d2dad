use super::*;

#[test]
fn a_certificate_survives_its_text_and_a_damaged_one_is_refused() {
    let pem = generate_certificate().unwrap();
    let keys = crate::ids::keypair([3; 32]);
    assert!(listener(&keys, Some(&pem)).is_ok());
    assert_ne!(pem, generate_certificate().unwrap());
    let damaged = pem.replace("CERTIFICATE", "TESTIMONIAL");
    let error = listener(&keys, Some(&damaged)).err().unwrap().to_string();
    assert!(error.contains("WebRTC certificate"), "{error}");
    assert!(listener(&keys, Some("")).is_err());
}

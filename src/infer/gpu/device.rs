//! An opened adapter: choosing it, allocating on it, submitting to it, and turning every failure
//! into a [`BackendError`].
//!
//! A software adapter (lavapipe, WARP, SwiftShader) is opened only on request, because it is slower
//! than the CPU backend. Nothing a driver does causes a panic here; an error that no scope caught
//! is kept and returned by the next call.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use wgpu::{BufferUsages, DeviceType};

use super::cooperative::Cooperative;
use super::executor::GpuBackend;
use super::hush;
use super::params::{self, ARENA_SLOT, Steps};
use super::pipeline_file::PipelineFile;
use super::pipelines::{Pipelines, Reduction};
use super::readback::Readback;
use super::spill;
use super::supports;
use super::timing::{self, Meter};
use super::trusted;
use crate::backend::{Backend, BackendError, Bandwidth, Capacity, Counters, Device, Result};
use crate::graph::{ExpertLayout, Graph};

/// How long a submission may take before the device counts as lost. A driver's own watchdog acts
/// much sooner; this only bounds the wait on a driver without one.
pub(super) const ANSWER_WAIT_MAX: Duration = Duration::from_secs(600);

/// How long the host polls for an answer before it sleeps.
const WATCH_MAX: Duration = Duration::from_micros(500);

/// Which adapters may be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AdapterChoice {
    /// A GPU: a discrete one if there is one, then an integrated, then a virtual one.
    #[default]
    Hardware,
    /// A GPU if there is one, otherwise a software adapter.
    Any,
    /// A software adapter, for tests.
    Software,
}

/// An opened device. Cheap to clone. Makes a backend for each graph.
#[derive(Clone)]
pub struct GpuDevice {
    inner: Arc<Inner>,
    meter: Arc<Meter>,
    timed: bool,
}

struct Inner {
    device: wgpu::Device,
    queue: wgpu::Queue,
    info: wgpu::AdapterInfo,
    limits: wgpu::Limits,
    faults: Arc<Mutex<Faults>>,
    pipelines: Pipelines,
    /// Whether subgroup operations may be used and subgroups have at least 32 invocations.
    subgroups: bool,
}

/// Errors that the driver reported outside of any scope.
#[derive(Default)]
struct Faults {
    /// Never cleared: a lost device does not come back.
    lost: Option<String>,
    /// The first uncaught error since the last check.
    error: Option<wgpu::Error>,
}

impl GpuDevice {
    /// Opens the best adapter that the choice allows.
    pub fn open(choice: AdapterChoice) -> Result<Self> {
        Self::open_with(choice, None)
    }

    /// As `open`, but the caller chooses how rows are summed, instead of the adapter's type.
    pub fn open_with(choice: AdapterChoice, reduction: Option<Reduction>) -> Result<Self> {
        let mut adapters = hush::without_line(|| {
            pollster::block_on(instance().enumerate_adapters(wgpu::Backends::all()))
        });
        adapters.retain(|adapter| rank(adapter.get_info().device_type, choice).is_some());
        // The sort is stable: equals stay in the driver's order.
        adapters.sort_by_key(|adapter| rank(adapter.get_info().device_type, choice));
        let Some(adapter) = adapters.first() else {
            return Err(BackendError::NoDevice(match choice {
                AdapterChoice::Hardware => "no GPU adapter found; use the CPU backend".into(),
                AdapterChoice::Any => "no GPU or software adapter found".into(),
                AdapterChoice::Software => "no software adapter found (Mesa's lavapipe?)".into(),
            }));
        };
        Self::from_adapter(adapter, reduction)
    }

    fn from_adapter(adapter: &wgpu::Adapter, reduction: Option<Reduction>) -> Result<Self> {
        let info = adapter.get_info();
        let offered = adapter.limits();
        // WebGPU's defaults, but as much memory as there is.
        let mut limits = wgpu::Limits {
            max_buffer_size: offered.max_buffer_size,
            max_storage_buffer_binding_size: offered.max_storage_buffer_binding_size,
            ..wgpu::Limits::default()
        };
        let reduction = reduction.unwrap_or(match info.device_type {
            DeviceType::Cpu => Reduction::Lane,
            _ => Reduction::Group,
        });
        // The variants for software adapters stay portable.
        let cooperative = match reduction {
            Reduction::Lane => None,
            Reduction::Group => Cooperative::of(adapter),
        };
        let mut features = adapter.features()
            & (wgpu::Features::SUBGROUP
                | wgpu::Features::PIPELINE_CACHE
                | spill::FEATURE
                | wgpu::Features::TIMESTAMP_QUERY
                | wgpu::Features::TIMESTAMP_QUERY_INSIDE_ENCODERS
                | wgpu::Features::TIMESTAMP_QUERY_INSIDE_PASSES);
        let mut experimental = wgpu::ExperimentalFeatures::disabled();
        if cooperative.is_some() {
            features |= Cooperative::features();
            experimental = trusted::experimental();
            Cooperative::raise(&mut limits, &offered);
        }
        let wanted = wgpu::DeviceDescriptor {
            label: Some("doppler-node"),
            required_features: features,
            experimental_features: experimental,
            required_limits: limits.clone(),
            ..Default::default()
        };
        let (device, queue) = pollster::block_on(adapter.request_device(&wanted))
            .map_err(|e| BackendError::NoDevice(format!("{}: {e}", info.name)))?;
        let faults = Arc::new(Mutex::new(Faults::default()));
        let seen = Arc::clone(&faults);
        device.set_device_lost_callback(move |reason, message| {
            lock(&seen).lost = Some(format!("{reason:?}: {message}"));
        });
        let seen = Arc::clone(&faults);
        device.on_uncaptured_error(Arc::new(move |error| {
            lock(&seen).error.get_or_insert(error);
        }));
        let subgroups =
            device.features().contains(wgpu::Features::SUBGROUP) && info.subgroup_min_size >= 32;
        let pipelines = Pipelines::new(&device, reduction, cooperative);
        let meter = Arc::new(Meter::new(&device, &queue, false));
        let inner = Inner { device, queue, info, limits, faults, pipelines, subgroups };
        let device = Self { inner: Arc::new(inner), meter, timed: false };
        if reduction == Reduction::Group {
            let keeps = device.unpacks_halves()?;
            device.pipelines().set_keeps_halves(keeps);
        }
        Ok(device)
    }

    /// Whether the adapter unpacks subnormal f16s (below 2^-14) exactly.
    fn unpacks_halves(&self) -> Result<bool> {
        let pipeline = self.pipelines().get(self, "halves")?;
        let bytes = 1024 * 4;
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
        let result = self.buffer("unpacked f16s", bytes, usage)?;
        let usage = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST;
        let arena = self.buffer("the first f16", ARENA_SLOT, usage)?;
        self.write(&arena, 0, bytemuck::bytes_of(&params::Halves { first: 0 }));
        let common = self.common(&arena)?;
        let storage = pipeline.bind(self, &[&result])?;
        let mut readback = Readback::new(self, "unpacked f16s", bytes)?;
        let mut encoder = self.wgpu().create_command_encoder(&Default::default());
        {
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
            pass.set_pipeline(&pipeline.pipeline);
            pass.set_bind_group(0, &common, &[0]);
            pass.set_bind_group(1, &storage, &[]);
            pass.dispatch_workgroups(4, 1, 1);
        }
        readback.copy(self, &mut encoder, &result, bytes)?;
        let submission = self.submit(encoder)?;
        readback.submitted(bytes, &submission);
        let got: Vec<f32> = bytemuck::pod_collect_to_vec(&readback.take(self)?.unwrap_or_default());
        Ok(got == crate::cpu::halves::halves())
    }

    /// Keeps the driver's compiled kernels in `dir`, and starts with those kept there. Only for
    /// drivers that give them out; others may cache them by themselves.
    pub fn keep_pipelines(&self, dir: &Path) {
        if self.wgpu().features().contains(wgpu::Features::PIPELINE_CACHE)
            && let Some(file) = PipelineFile::of(dir, &self.inner.info)
        {
            self.pipelines().keep(self.wgpu(), file);
        }
    }

    /// The same device, whose backends measure how long it computes, if the adapter has timestamps.
    pub fn timed(self) -> Self {
        Self { timed: true, ..self }
    }

    /// The same device with separate counters.
    pub(super) fn metered(&self) -> Self {
        let Inner { device, queue, .. } = self.inner.as_ref();
        let meter = Arc::new(Meter::new(device, queue, self.timed));
        Self { inner: Arc::clone(&self.inner), meter, timed: self.timed }
    }

    pub(super) fn meter(&self) -> &Meter {
        &self.meter
    }

    pub(super) fn counters(&self) -> Counters {
        self.meter.counters(self)
    }

    /// "NVIDIA H200 (Vulkan, NVIDIA 550.54, DiscreteGpu, prompts on cooperative matrices)"; says so
    /// if sums do not use subgroups.
    pub fn describe(&self) -> String {
        let info = &self.inner.info;
        let prompts = match self.pipelines().cooperative {
            Some(_) => "prompts on cooperative matrices",
            None => "prompts in f32 tiles",
        };
        let sums = if self.inner.subgroups { "" } else { ", no subgroups" };
        format!(
            "{} ({:?}, {} {}, {:?}, {prompts}{sums})",
            info.name, info.backend, info.driver, info.driver_info, info.device_type
        )
    }

    /// Whether the adapter is a software one.
    pub fn is_software(&self) -> bool {
        self.inner.info.device_type == DeviceType::Cpu
    }

    /// Whether a prompt's products run on cooperative matrices of f16.
    #[cfg(test)]
    pub(super) fn cooperative(&self) -> bool {
        self.pipelines().cooperative.is_some_and(Cooperative::multiplies)
    }

    /// The most bytes of one binding.
    pub(super) fn binding_bytes_max(&self) -> u64 {
        let limits = &self.inner.limits;
        // Words are indexed by u32, and sizes must be a multiple of 4.
        u64::from(u32::MAX).min(limits.max_storage_buffer_binding_size).min(limits.max_buffer_size)
            / 16
            * 16
    }

    pub(super) fn workgroups_max(&self) -> u32 {
        self.inner.limits.max_compute_workgroups_per_dimension
    }

    pub(super) fn params_alignment(&self) -> u64 {
        u64::from(self.inner.limits.min_uniform_buffer_offset_alignment)
    }

    pub(super) fn pipelines(&self) -> &Pipelines {
        &self.inner.pipelines
    }

    /// Nanoseconds of one tick of the device's timestamps.
    pub(super) fn tick_nanoseconds(&self) -> f32 {
        self.inner.queue.get_timestamp_period()
    }

    /// How the decode kernels' teams of 32 sum: the suffix of their names.
    pub(super) fn team(&self) -> &'static str {
        if self.inner.subgroups { "subgroup" } else { "group" }
    }

    /// Whether single tokens run fused. Not if workgroup memory and barriers are expensive.
    pub(super) fn fuses(&self) -> bool {
        self.pipelines().reduction == Reduction::Group
    }

    /// Whether keeping experts in host memory pays: the device has memory of its own and can read
    /// the host's. True for software adapters, so that it can be tested without a GPU.
    pub(super) fn spills(&self) -> bool {
        let apart =
            matches!(self.inner.info.device_type, DeviceType::DiscreteGpu | DeviceType::Cpu);
        apart && self.wgpu().features().contains(spill::FEATURE)
    }

    pub(super) fn wgpu(&self) -> &wgpu::Device {
        &self.inner.device
    }

    /// Group 0 for kernels with a single set of parameters that do not read the step. Any bytes can
    /// stand in for the step.
    pub(super) fn common(&self, arena: &wgpu::Buffer) -> Result<wgpu::BindGroup> {
        let entry = |binding, bytes| wgpu::BindGroupEntry {
            binding,
            resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                buffer: arena,
                offset: 0,
                size: std::num::NonZeroU64::new(bytes),
            }),
        };
        self.scoped("a bind group of parameters", 0, |wgpu| {
            wgpu.create_bind_group(&wgpu::BindGroupDescriptor {
                label: Some("parameters"),
                layout: &self.pipelines().common,
                entries: &[entry(0, size_of::<Steps>() as u64), entry(1, ARENA_SLOT)],
            })
        })
    }

    /// A zeroed buffer of `bytes`, rounded up to a multiple of 16. A storage buffer must fit one
    /// binding.
    pub(super) fn buffer(
        &self,
        what: &str,
        bytes: u64,
        usage: BufferUsages,
    ) -> Result<wgpu::Buffer> {
        let size = bytes.max(16).next_multiple_of(16);
        let most = if usage.contains(BufferUsages::STORAGE) {
            self.binding_bytes_max()
        } else {
            self.inner.limits.max_buffer_size
        };
        if size > most {
            let what = format!("{what} (the adapter's limit is {most} bytes a buffer)");
            return Err(BackendError::OutOfMemory { what, bytes });
        }
        let label = Some(what);
        self.scoped(what, bytes, |device| {
            device.create_buffer(&wgpu::BufferDescriptor {
                label,
                size,
                usage,
                mapped_at_creation: false,
            })
        })
    }

    /// Runs `make` within its own error scopes. Its errors are returned.
    pub(super) fn scoped<T>(
        &self,
        what: &str,
        bytes: u64,
        make: impl FnOnce(&wgpu::Device) -> T,
    ) -> Result<T> {
        self.check()?;
        let device = &self.inner.device;
        let validation = device.push_error_scope(wgpu::ErrorFilter::Validation);
        let internal = device.push_error_scope(wgpu::ErrorFilter::Internal);
        let memory = device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let made = make(device);
        let errors = [memory, internal, validation].map(|scope| pollster::block_on(scope.pop()));
        match errors.into_iter().flatten().next() {
            None => Ok(made),
            Some(error) => Err(self.translate(what, bytes, &error)),
        }
    }

    /// Writes to a buffer, before anything that is submitted later. Offset and length must be
    /// multiples of 4.
    pub(super) fn write(&self, buffer: &wgpu::Buffer, offset: u64, bytes: &[u8]) {
        self.meter.uploaded(bytes.len());
        self.inner.queue.write_buffer(buffer, offset, bytes);
    }

    pub(super) fn submit(&self, encoder: wgpu::CommandEncoder) -> Result<wgpu::SubmissionIndex> {
        self.submit_all(encoder, None)
    }

    /// Submits what `encoder` recorded, then `more`, as one submission.
    pub(super) fn submit_all(
        &self,
        encoder: wgpu::CommandEncoder,
        more: impl IntoIterator<Item = wgpu::CommandBuffer>,
    ) -> Result<wgpu::SubmissionIndex> {
        self.meter.submitted();
        let index = self.submit_unmetered(encoder, more)?;
        self.meter.make_room(self)?;
        Ok(index)
    }

    /// A submission that is not counted.
    pub(super) fn submit_unmetered(
        &self,
        encoder: wgpu::CommandEncoder,
        more: impl IntoIterator<Item = wgpu::CommandBuffer>,
    ) -> Result<wgpu::SubmissionIndex> {
        let index = self.scoped("a submission", 0, |_| {
            self.inner.queue.submit(std::iter::once(encoder.finish()).chain(more))
        })?;
        self.check()?;
        Ok(index)
    }

    /// Sends pending writes and waits until their staging memory is free again.
    pub(super) fn flush(&self) -> Result<()> {
        self.meter.submitted();
        let index = self.scoped("an upload", 0, |_| self.inner.queue.submit(std::iter::empty()))?;
        self.wait(Some(index))
    }

    /// Polls for an answer for about as long as falling asleep and waking up would take. Does not
    /// poll if the device computes on the same cores.
    pub(super) fn watch<T>(&self, mut answer: impl FnMut() -> Option<T>) -> Option<T> {
        let until = Instant::now() + WATCH_MAX;
        while !self.is_software() && Instant::now() < until {
            // An error will be reported again by the wait or with the answer.
            let _ = self.inner.device.poll(wgpu::PollType::Poll);
            if let Some(answer) = answer() {
                return Some(answer);
            }
            std::hint::spin_loop();
        }
        None
    }

    /// Waits for a submission (the latest if none is given) and its callbacks.
    pub(super) fn wait(&self, submission: Option<wgpu::SubmissionIndex>) -> Result<()> {
        let poll =
            wgpu::PollType::Wait { submission_index: submission, timeout: Some(ANSWER_WAIT_MAX) };
        let polled = self.inner.device.poll(poll);
        self.check()?;
        match polled {
            Ok(_) => Ok(()),
            Err(e) => Err(BackendError::Lost(format!("{}: {e}", self.inner.info.name))),
        }
    }

    /// Returns the device's loss, every time, or the last uncaught error, once.
    pub(super) fn check(&self) -> Result<()> {
        let mut faults = lock(&self.inner.faults);
        if let Some(lost) = &faults.lost {
            return Err(BackendError::Lost(lost.clone()));
        }
        match faults.error.take() {
            None => Ok(()),
            Some(error) => {
                drop(faults);
                Err(self.translate("the last step", 0, &error))
            }
        }
    }

    fn translate(&self, what: &str, bytes: u64, error: &wgpu::Error) -> BackendError {
        if let Some(lost) = &lock(&self.inner.faults).lost {
            return BackendError::Lost(lost.clone());
        }
        match error {
            wgpu::Error::OutOfMemory { .. } => {
                BackendError::OutOfMemory { what: what.to_owned(), bytes }
            }
            wgpu::Error::Validation { description, .. }
            | wgpu::Error::Internal { description, .. } => {
                let words: Vec<&str> = description.split_whitespace().collect();
                BackendError::Unsupported(format!(
                    "{what} on {}: {}",
                    self.inner.info.name,
                    words.join(" ")
                ))
            }
        }
    }
}

impl Device for GpuDevice {
    fn supports(&self, graph: &Graph, experts: &[ExpertLayout]) -> Result<()> {
        supports::check(graph, experts)
    }

    fn backend(&self, graph: Arc<Graph>, capacity: Capacity) -> Result<Box<dyn Backend>> {
        Ok(Box::new(GpuBackend::new(self.metered(), graph, capacity)?))
    }

    fn bandwidth(&self) -> Result<Bandwidth> {
        timing::bandwidth(self)
    }
}

/// The process's only instance. Drivers have been seen to crash when several are created and
/// destroyed at once.
fn instance() -> &'static wgpu::Instance {
    static INSTANCE: OnceLock<wgpu::Instance> = OnceLock::new();
    INSTANCE.get_or_init(|| {
        let mut wanted = wgpu::InstanceDescriptor::new_without_display_handle();
        wanted.backends = wgpu::Backends::VULKAN | wgpu::Backends::METAL | wgpu::Backends::DX12;
        wgpu::Instance::new(wanted)
    })
}

/// Lower is better. `None` if the choice excludes this type.
fn rank(kind: DeviceType, choice: AdapterChoice) -> Option<u8> {
    let order = match kind {
        DeviceType::DiscreteGpu => 0,
        DeviceType::IntegratedGpu => 1,
        DeviceType::VirtualGpu => 2,
        DeviceType::Other => 3,
        DeviceType::Cpu => 4,
    };
    let software = kind == DeviceType::Cpu;
    match choice {
        AdapterChoice::Hardware => (!software).then_some(order),
        AdapterChoice::Any => Some(order),
        AdapterChoice::Software => software.then_some(order),
    }
}

/// The faults are plain data, which a panic elsewhere leaves usable.
fn lock(faults: &Mutex<Faults>) -> MutexGuard<'_, Faults> {
    faults.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn hardware_never_means_a_software_adapter() {
        assert_eq!(rank(DeviceType::Cpu, AdapterChoice::Hardware), None);
        assert_eq!(rank(DeviceType::DiscreteGpu, AdapterChoice::Software), None);
        let any = |kind| rank(kind, AdapterChoice::Any).unwrap();
        assert!(any(DeviceType::DiscreteGpu) < any(DeviceType::IntegratedGpu));
        assert!(any(DeviceType::Other) < any(DeviceType::Cpu));
    }
}

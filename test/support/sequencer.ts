/**
 * The order of the test files of all projects: the longest first, so that no worker is left with a long one at the end. On two cores the
 * order is worth minutes. Only the order depends on the numbers; a file that is not in the list counts as a short one.
 */
import { relative } from 'node:path';
import { BaseSequencer, type TestSpecification } from 'vitest/node';

/** Seconds that files took, beside others, on two cores (those above five). */
const SECONDS: Readonly<Record<string, number>> = {
  'e2e/done': 130,
  'e2e/kill': 100,
  'integration/restore/restore': 57,
  'unit/crash/fault-sweep': 38,
  'e2e/files-vm': 36,
  'unit/crash/crash-sweep': 36,
  'e2e/mount': 35,
  'e2e/extractor': 34,
  'integration/trace-exactness': 33,
  'e2e/output': 32,
  'e2e/tape': 30,
  'unit/concurrency/interleaving': 28,
  'integration/devices/tables': 24,
  'integration/nbd/overlay-kill': 24,
  'e2e/files': 23,
  'integration/capture/freeze': 23,
  'integration/watch/session': 23,
  'e2e/secrets': 22,
  'unit/concurrency/operations': 22,
  'e2e/refusals': 21,
  'e2e/demo': 20,
  'e2e/watch': 20,
  'integration/capture/live': 20,
  'integration/devices/conformance': 19,
  'e2e/files-mount': 18,
  'integration/devices/grow': 18,
  'unit/tape/export': 18,
  'e2e/boot': 16,
  'e2e/history': 14,
  'e2e/verify-repair': 14,
  'unit/repo/store-directory': 14,
  'integration/trace-sources': 13,
  'integration/repo/store-directory': 12,
  'integration/mount/serve': 10,
  'integration/nbd/clients': 10,
  'unit/verify/bit-flips': 10,
  'integration/verify/fsck': 9,
  'unit/capture/scan': 9,
  'unit/extractor/extract': 9,
  'integration/capture/scan': 8,
  'unit/concurrency/processes': 8,
  'unit/layers': 8,
  'unit/nbd/overlay': 8,
  'unit/repair/repair': 8,
  'unit/repo/segments/segments': 8,
  'unit/capture/baseline': 7,
  'unit/repo/lease': 6,
  'unit/watch/session': 6,
};

/** What a file takes that is not in the list. */
const SHORT = 2;

export class LongestFirst extends BaseSequencer {
  override sort(files: TestSpecification[]): Promise<TestSpecification[]> {
    const root = this.ctx.config.root;
    const seconds = (spec: TestSpecification): number =>
      SECONDS[relative(root, spec.moduleId).replace(/^test\/(.*)\.test\.tsx?$/, '$1')] ?? SHORT;
    return Promise.resolve(
      files.toSorted((a, b) => seconds(b) - seconds(a) || (a.moduleId < b.moduleId ? -1 : 1)),
    );
  }
}

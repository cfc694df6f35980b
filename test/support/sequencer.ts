/**
 * The order of the test files of all projects: the longest first, so that no worker is left with a long one at the end. On two cores the
 * order is worth minutes. Only the order depends on the numbers; a file that is not in the list counts as a short one.
 */
import { relative } from 'node:path';
import { BaseSequencer, type TestSpecification } from 'vitest/node';

/** Seconds that files took, beside others, on two cores (those above five). */
const SECONDS: Readonly<Record<string, number>> = {
  'e2e/done': 205,
  'e2e/kill': 156,
  'e2e/files-vm': 123,
  'unit/crash/fault-sweep': 83,
  'integration/restore/restore': 67,
  'unit/crash/crash-sweep': 60,
  'e2e/extractor': 51,
  'e2e/tape': 50,
  'e2e/boot': 50,
  'e2e/demo': 49,
  'integration/watch/session': 43,
  'integration/proof/exactness': 39,
  'e2e/output': 37,
  'e2e/mount': 35,
  'unit/concurrency/interleaving': 35,
  'unit/tape/export': 35,
  'e2e/files': 30,
  'e2e/watch': 30,
  'integration/trace-exactness': 30,
  'e2e/files-lvm': 29,
  'integration/capture/freeze': 29,
  'e2e/history': 28,
  'e2e/refusals': 28,
  'unit/concurrency/operations': 28,
  'e2e/secrets': 27,
  'integration/files/ntfs': 27,
  'integration/nbd/overlay-kill': 26,
  'integration/proof/survival': 26,
  'integration/devices/conformance': 25,
  'integration/devices/tables': 24,
  'unit/repo/store-directory': 22,
  'unit/tape/copies': 21,
  'integration/repo/store-directory': 18,
  'unit/verify/bit-flips': 18,
  'integration/trace-sources': 17,
  'unit/repair/repair': 17,
  'integration/proof/acknowledged': 16,
  'integration/capture/live': 15,
  'unit/layers': 15,
  'e2e/files-mount': 14,
  'e2e/verify-repair': 14,
  'unit/extractor/extract': 14,
  'unit/repo/segments/segments': 14,
  'integration/capture/scan': 12,
  'integration/devices/grow': 12,
  'unit/capture/baseline': 12,
  'unit/capture/scan': 12,
  'unit/nbd/overlay': 12,
  'unit/repo/read-ahead': 12,
  'e2e/launcher': 10,
  'integration/nbd/clients': 10,
  'integration/tape/full-disk': 10,
  'unit/capture/group': 10,
  'unit/concurrency/processes': 10,
  'unit/repo/lease': 10,
  'unit/verify/verify': 9,
  'unit/watch/session': 9,
  'integration/files/group-btrfs': 8,
  'integration/verify/fsck': 8,
  'e2e/history-group': 7,
  'unit/capture/overload': 7,
  'unit/repo/segments/maintain': 7,
  'e2e/files-group': 6,
  'integration/mount/serve': 6,
  'integration/restore/command': 6,
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

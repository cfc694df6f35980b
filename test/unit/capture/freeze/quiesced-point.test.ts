/** When a point of class `fs` or `app` is refused, tried again, given up; and that nothing stays frozen then. */
import { describe, expect, it } from 'vitest';
import type { Frozen, Thawed } from '../../../../src/capture/freeze/freezer.js';
import { holdingOf, type WatchedMount } from '../../../../src/capture/freeze/mounts.js';
import {
  quiescedPoint,
  type Freeze,
  type FreezesFor,
  type PointMaker,
  type QuiesceOptions,
} from '../../../../src/capture/freeze/quiesced-point.js';
import type { CapturedPoint, LetGo } from '../../../../src/capture/live-capture.js';
import { systemClock, type Clock } from '../../../../src/clock.js';
import { B2Error } from '../../../../src/errors.js';
import { Coverage, PointClass } from '../../../../src/format/commit.js';
import { tempDir } from '../../../support/tmp.js';

// Any directory will do to be synced.
const MOUNT: WatchedMount = {
  mountPoint: '/proc',
  openPath: '/proc',
  fsType: 'ext4',
  device: '/dev/sdx1',
  blockName: 'sdx1',
  devNumber: '8:1',
  holding: 'freeze',
  why: undefined,
};

class FakeCapture implements PointMaker {
  readonly classes: PointClass[] = [];
  pendingBlocks = 0;
  /** Writers never pause: ordinary points do not come about. */
  isOutrun = false;
  /** What a point of class fs does. */
  onHeld: (letGo: LetGo, signal?: AbortSignal) => Promise<void> = async (letGo) => {
    if (!(await letGo())) throw new B2Error('failed', 'the writers were not held still');
  };
  private seq = 0;

  async point(
    pointClass: PointClass = PointClass.crash,
    signal?: AbortSignal,
    letGo?: LetGo,
  ): Promise<CapturedPoint> {
    this.classes.push(pointClass);
    if (this.isOutrun && pointClass === PointClass.crash)
      await new Promise((_, reject) =>
        signal?.addEventListener('abort', () =>
          reject(new B2Error('interrupted', 'nobody waits any longer')),
        ),
      );
    if (letGo !== undefined) await this.onHeld(letGo, signal);
    return {
      seq: ++this.seq,
      instantNs: 0n,
      instantSourceNs: 0,
      pointClass,
      coverage: Coverage.exact,
      blocks: 0,
      storedBytes: 0,
      rounds: 1,
      cutMs: 1,
      ageMs: 1,
    };
  }

  status(): ReturnType<PointMaker['status']> {
    // 100 MB a second.
    return { pendingBlocks: this.pendingBlocks, readBytes: 100_000_000, readMs: 1000 };
  }
}

class FakeFreezer implements FreezesFor {
  isUsable = true;
  freezes = 0;
  thaws = 0;
  thawed: Thawed = { held: true, frozenMs: 12, why: undefined };
  fail: B2Error | undefined;

  freeze(): Promise<Frozen> {
    this.freezes++;
    if (this.fail !== undefined) return Promise.reject(this.fail);
    let result: Promise<Thawed> | undefined;
    return Promise.resolve({
      sinceNs: systemClock.monotonicNs(),
      thaw: () => {
        this.thaws += result === undefined ? 1 : 0;
        return (result ??= Promise.resolve(this.thawed));
      },
    });
  }
}

function options(freezer: FreezesFor, more: Partial<QuiesceOptions> = {}): QuiesceOptions {
  return {
    clock: systemClock,
    device: { path: '/dev/sdx' },
    volume: 'host/sdx',
    pointClass: PointClass.fs,
    boundMs: 1000,
    freezer,
    ...more,
  };
}

/** A hundred times as fast as the system's. */
const fastClock: Clock = {
  nowNs: () => systemClock.nowNs(),
  monotonicNs: () => systemClock.monotonicNs() * 100n,
  sleep: (ms, signal) => systemClock.sleep(ms / 100, signal),
};

/** A clock of which ten seconds pass when it is told to, and whose sleeps are short. */
function leapingClock(): { readonly clock: Clock; leap(): void } {
  let aheadNs = 0n;
  return {
    clock: {
      nowNs: () => systemClock.nowNs(),
      monotonicNs: () => systemClock.monotonicNs() + aheadNs,
      sleep: (ms, signal) => systemClock.sleep(ms / 10, signal),
    },
    leap: () => {
      aheadNs += 10_000_000_000n;
    },
  };
}

async function refusal(made: Promise<unknown>): Promise<B2Error> {
  try {
    await made;
  } catch (error) {
    if (error instanceof B2Error) return error;
    throw error;
  }
  throw new Error('it was not refused');
}

describe('a point with frozen file systems', () => {
  it('is made after two ordinary points', async () => {
    const capture = new FakeCapture();
    const freezer = new FakeFreezer();
    const made = await quiescedPoint(capture, [MOUNT], options(freezer));
    expect(made).toMatchObject({ frozenMs: 12, frozen: ['/proc'], stayedQuiet: [] });
    expect(made.point.pointClass).toBe(PointClass.fs);
    expect(capture.classes).toEqual([
      PointClass.crash,
      PointClass.crash,
      PointClass.crash,
      PointClass.fs,
    ]);
    expect([freezer.freezes, freezer.thaws]).toEqual([1, 1]);
  });

  it('is made where writers let no ordinary point through', async () => {
    const capture = new FakeCapture();
    capture.isOutrun = true;
    capture.pendingBlocks = 100;
    const freezes: Freeze[] = [];
    const made = await quiescedPoint(
      capture,
      [MOUNT],
      options(new FakeFreezer(), { clock: fastClock, onFreeze: (f) => freezes.push(f) }),
    );
    expect(made.point.pointClass).toBe(PointClass.fs);
    expect(freezes).toEqual([{ frozenMs: 12, mountPoints: ['/proc'] }]);
  });

  it('is given up, with a clear answer, where reading never catches up or the disk does not sync', async () => {
    const capture = new FakeCapture();
    capture.isOutrun = true;
    capture.pendingBlocks = 1_000_000;
    const freezer = new FakeFreezer();
    const error = await refusal(
      quiescedPoint(capture, [MOUNT], options(freezer, { clock: fastClock, limitMs: 5000 })),
    );
    expect(error).toMatchObject({ kind: 'failed', retryable: true });
    expect(error.message).toMatch(/after 5 s there are still 3\.8 GiB of changes to be read/);
    capture.isOutrun = false;
    capture.pendingBlocks = 0;
    // A sync that is never over in time.
    const hurried: Clock = { ...fastClock, sleep: () => Promise.resolve() };
    const busy = await refusal(
      quiescedPoint(capture, [MOUNT], options(freezer, { clock: hurried, limitMs: 5000 })),
    );
    expect(busy).toMatchObject({ kind: 'failed', retryable: true });
    expect(busy.message).toMatch(/syncing its file systems takes longer than 5 s/);
    const given = new AbortController();
    capture.isOutrun = true;
    const asked = refusal(
      quiescedPoint(capture, [MOUNT], options(freezer, { signal: given.signal })),
    );
    given.abort();
    expect((await asked).kind).toBe('interrupted');
    expect(freezer.freezes).toBe(0);
  });

  it('is refused, without a freeze, where it would hold writers longer than the bound, saying by how much', async () => {
    const capture = new FakeCapture();
    capture.pendingBlocks = 100_000; // 409.6 MB at 100 MB a second
    const freezer = new FakeFreezer();
    const error = await refusal(
      quiescedPoint(capture, [MOUNT], options(freezer, { boundMs: 100 })),
    );
    expect(error).toMatchObject({ kind: 'failed', retryable: true });
    const [, need, more] =
      /would have to wait about (\d+) ms for it, (\d+) ms longer than the bound of 100 ms$/.exec(
        error.message,
      ) ?? [];
    expect(Number(need)).toBeGreaterThan(4096);
    expect(Number(need) - Number(more)).toBe(100);
    expect(freezer.freezes).toBe(0);
  });

  it('is given up before the bound, and thawed, three times', async () => {
    const capture = new FakeCapture();
    capture.onHeld = (_, signal) =>
      new Promise((_resolve, reject) => {
        signal?.addEventListener('abort', () => reject(new B2Error('interrupted', 'given up')));
      });
    const freezer = new FakeFreezer();
    const error = await refusal(quiescedPoint(capture, [MOUNT], options(freezer, { boundMs: 60 })));
    expect(error.message).toMatch(/longer than the bound of 60 ms/);
    expect(freezer.freezes).toBe(freezer.thaws);
  });

  it('is given up where the freeze itself takes longer than the bound, which is told', async () => {
    const capture = new FakeCapture();
    const freezes: number[] = [];
    const freezer = new FakeFreezer();
    // As the real one: the kernel cannot be called off, and is thawed at once when it comes back.
    const { clock, leap } = leapingClock();
    freezer.freeze = () => {
      freezer.freezes++;
      leap();
      return Promise.reject(
        new B2Error('failed', 'freezing took too long: the bound of 5000 ms was over', {
          retryable: true,
        }),
      );
    };
    const onFreeze = (f: Freeze): void => {
      expect(f.mountPoints).toEqual([MOUNT.mountPoint]);
      freezes.push(f.frozenMs);
    };
    const error = await refusal(
      quiescedPoint(capture, [MOUNT], options(freezer, { boundMs: 5000, clock, onFreeze })),
    );
    expect(error.message).toMatch(/freezing took too long/);
    expect([error.retryable, freezer.freezes]).toEqual([true, 3]);
    expect(freezes.map((ms) => ms >= 10_000)).toEqual([true, true, true]);
    expect(capture.classes).not.toContain(PointClass.fs);
  });

  it('is given up at once where the freeze has taken all of the bound, thawed', async () => {
    const capture = new FakeCapture();
    capture.onHeld = (_, signal) =>
      new Promise((_resolve, reject) => {
        signal?.addEventListener('abort', () => reject(new B2Error('interrupted', 'given up')));
      });
    const freezer = new FakeFreezer();
    const quick = freezer.freeze.bind(freezer);
    const { clock, leap } = leapingClock();
    freezer.freeze = async () => {
      const frozen = await quick();
      leap();
      return frozen;
    };
    const error = await refusal(
      quiescedPoint(capture, [MOUNT], options(freezer, { boundMs: 5000, clock })),
    );
    expect(error.message).toMatch(/longer than the bound of 5000 ms/);
    expect([freezer.freezes, freezer.thaws]).toEqual([3, 3]);
  });

  it('is not claimed when it was thawed too early', async () => {
    const capture = new FakeCapture();
    const freezer = new FakeFreezer();
    freezer.thawed = { held: false, frozenMs: 1000, why: 'the bound of 1000 ms was over' };
    const error = await refusal(
      quiescedPoint(capture, [MOUNT], options(freezer, { boundMs: 100 })),
    );
    expect(error.message).toBe(
      'no point of class fs of /dev/sdx: the file systems did not stay frozen: the bound of 1000 ms was over',
    );
  });

  it('ends with an error of the repository as that error, thawed', async () => {
    const capture = new FakeCapture();
    capture.onHeld = async (letGo) => {
      await letGo();
      throw new B2Error('no-space', 'the repository is full');
    };
    const freezer = new FakeFreezer();
    const error = await refusal(quiescedPoint(capture, [MOUNT], options(freezer)));
    expect(error.kind).toBe('no-space');
    expect([freezer.freezes, freezer.thaws]).toEqual([1, 1]);
  });

  it('is given up when the caller gives up, thawed', async () => {
    const abort = new AbortController();
    const capture = new FakeCapture();
    capture.onHeld = (_, signal) =>
      new Promise((_resolve, reject) => {
        signal?.addEventListener('abort', () => reject(new B2Error('interrupted', 'given up')));
        abort.abort();
      });
    const freezer = new FakeFreezer();
    const error = await refusal(
      quiescedPoint(capture, [MOUNT], options(freezer, { signal: abort.signal })),
    );
    expect(error.kind).toBe('interrupted');
    expect([freezer.freezes, freezer.thaws]).toEqual([1, 1]);
  });

  it('is refused for what must not be frozen, and where there is nothing to freeze', async () => {
    const freezer = new FakeFreezer();
    const never: WatchedMount = { ...MOUNT, holding: 'never', why: 'it holds the repository /r' };
    const capture = new FakeCapture();
    expect(await refusal(quiescedPoint(capture, [MOUNT, never], options(freezer)))).toMatchObject({
      kind: 'refused',
      message:
        '/proc (/dev/sdx1) is not frozen for a point of /dev/sdx: it holds the repository /r',
    });
    expect(await refusal(quiescedPoint(capture, [], options(freezer)))).toMatchObject({
      kind: 'unsupported',
    });
    expect([capture.classes, freezer.freezes]).toEqual([[], 0]);
  });
});

describe('a point with an application at rest', () => {
  const app = { pointClass: PointClass.app };

  it('lies between the hooks, which are told about it', async () => {
    await using dir = tempDir();
    const capture = new FakeCapture();
    const freezer = new FakeFreezer();
    const log = dir.join('log');
    const made = await quiescedPoint(
      capture,
      [MOUNT],
      options(freezer, {
        ...app,
        hooks: {
          prePoint: `echo "pre $B2_VOLUME $B2_DEVICE $B2_POINT_CLASS" >${log}`,
          postPoint: `echo "post $B2_POINT $B2_RESULT" >>${log}`,
        },
      }),
    );
    expect(made.point.pointClass).toBe(PointClass.app);
    const { readFileSync } = await import('node:fs');
    expect(readFileSync(log, 'utf8')).toBe(
      `pre host/sdx /dev/sdx app\npost ${made.point.seq} ok\n`,
    );
  });

  it('is not made when the first hook fails; the other runs nevertheless', async () => {
    await using dir = tempDir();
    const capture = new FakeCapture();
    const freezer = new FakeFreezer();
    const log = dir.join('log');
    const error = await refusal(
      quiescedPoint(
        capture,
        [MOUNT],
        options(freezer, {
          ...app,
          hooks: {
            prePoint: 'echo "no connection" >&2; exit 3',
            postPoint: `echo "$B2_RESULT [$B2_POINT]" >${log}; exit 4`,
          },
        }),
      ),
    );
    expect(error.message).toBe(
      'the pre-point command ended with exit code 3: no connection; and then the post-point command ended with exit code 4',
    );
    expect(capture.classes).not.toContain(PointClass.app);
    expect(freezer.freezes).toBe(0);
    const { readFileSync } = await import('node:fs');
    expect(readFileSync(log, 'utf8')).toBe('failed []\n');
  });

  it('stands when the last hook fails, with a warning; and needs nothing mounted', async () => {
    const warnings: string[] = [];
    const made = await quiescedPoint(
      new FakeCapture(),
      [],
      options(new FakeFreezer(), {
        ...app,
        hooks: { prePoint: 'true', postPoint: 'false' },
        warn: (error) => warnings.push(error.message),
      }),
    );
    expect(made).toMatchObject({ frozenMs: 0, frozen: [] });
    expect(warnings).toEqual(['the post-point command ended with exit code 1']);
  });

  it('needs a hook', async () => {
    const made = quiescedPoint(new FakeCapture(), [], options(new FakeFreezer(), app));
    expect((await refusal(made)).kind).toBe('usage');
  });
});

it('file systems are frozen, watched or left alone by their type', () => {
  expect(['ext4', 'xfs', 'btrfs', 'f2fs'].map(holdingOf)).toEqual(Array(4).fill('freeze'));
  expect(['vfat', 'exfat', 'ntfs3'].map(holdingOf)).toEqual(Array(3).fill('watch'));
  expect(['fuseblk', 'zfs', 'overlay'].map(holdingOf)).toEqual(Array(3).fill('never'));
});

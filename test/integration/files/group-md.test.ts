/** Members of one array in several volumes: which of them is outdated is told by the others, with what Debian's mdadm has made. */
import { readFileSync } from 'node:fs';
import { afterAll, beforeAll, expect, it } from 'vitest';

import type { Companions, FindCompanions } from '../../../src/files/companions.js';
import { findPointAreas, type PointLayout } from '../../../src/files/group-layout.js';
import { whyNotShown } from '../../../src/files/layout.js';
import type { Image } from '../../../src/image.js';
import { MD_TOOLS, unpackMembers } from '../../support/md.js';
import { requires } from '../../support/requires.js';
import { tempDir, type TempDir } from '../../support/tmp.js';

requires({ tools: MD_TOOLS }).describe('a member of an array, looked at with the others', () => {
  let dir: TempDir;
  let open = 0;
  const asked: boolean[] = [];

  beforeAll(() => {
    dir = tempDir();
    unpackMembers(dir.path);
  });
  afterAll(() => dir.remove());

  const image = (name: string): Promise<Image> => {
    const content = readFileSync(dir.join(name));
    open++;
    return Promise.resolve({
      sizeBytes: content.length,
      logicalBlockBytes: 512,
      read: (into, offset) => {
        content.copy(into, 0, offset, offset + into.length);
        return Promise.resolve();
      },
      extents: (offset, length) => Promise.resolve([{ offset, length, hole: false }]),
      close: () => {
        open--;
        return Promise.resolve();
      },
    });
  };
  const others =
    (names: readonly string[], missing: Companions['missing'] = []): FindCompanions =>
    (isSpread) => {
      asked.push(isSpread);
      const there = names.map((name, index) => ({
        volume: `lab/${name}`,
        index,
        openImage: () => image(name),
      }));
      return Promise.resolve({ group: 'md0', there, missing });
    };
  const look = async (name: string, companions?: FindCompanions): Promise<PointLayout> => {
    asked.length = 0;
    const layout = await findPointAreas({ openImage: () => image(name), name, companions });
    expect(open).toBe(0);
    return layout;
  };
  const shown = ({ areas }: PointLayout): readonly string[] =>
    areas.map((a) => `${a.name}: ${whyNotShown(a) ?? a.type}`);

  it('is not shown where it had dropped out, and the one that stayed is', async () => {
    // By itself it cannot know.
    expect(shown(await look('stale'))).toEqual(['disk: ext4']);
    const stale = await look('stale', others(['r1-12', 'degraded']));
    const why =
      /^disk: it is an outdated member of the RAID 1 array "lab:degraded" .* and is not shown: lab\/degraded has a newer one at that instant$/;
    expect(shown(stale)).toEqual([expect.stringMatching(why)]);
    // So of a file in it nothing is certain.
    expect(stale.missing).toEqual([expect.stringMatching(why)]);
    expect([stale.isSpread, stale.others, asked]).toEqual([false, [], [false]]);

    const stayed = await look('degraded', others(['stale']));
    expect([shown(stayed), stayed.missing, stayed.others]).toEqual([['disk: ext4'], [], []]);
  });

  it('is shown where the others are as old, are of another array, or are not there', async () => {
    for (const [name, other] of [
      ['r1-12', 'r1-12'],
      ['degraded', 'r1-12'],
    ] as const)
      expect(shown(await look(name, others([other])))).toEqual(['disk: ext4']);
    const missing = [{ volume: 'lab/other', reason: 'lab/other has no point of that instant' }];
    const alone = await look('stale', others([], missing));
    expect([shown(alone), alone.missing, alone.elsewhere]).toEqual([['disk: ext4'], [], []]);
    // An array of one member has no others.
    expect(shown(await look('r0-one', others(['stale'])))).toEqual(['disk: ext4']);
    expect(asked).toEqual([]);
  });
});

"""The sentences and words that the starter list is made of; read by :mod:`.starter`, which says how."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Kind:
    """A kind of picture.

    Attributes:
        name: of the kind.
        count: prompts in the list.
        sentences: one a line, with open places in braces. A full stop at the end makes it a sentence with a capital.
        words: open place -> what may stand there, besides :data:`SHARED`.
    """

    name: str
    count: int
    sentences: str
    words: dict[str, str] = field(default_factory=dict)


# Open places that fit any kind.
SHARED = {
    "light": """soft morning light; golden hour; overcast light; warm evening light; backlit by the low sun; blue hour
        harsh midday sun; moonlight; diffuse daylight; the last light of the day; dappled shade; pale winter light""",
    "indoors": """candlelight; light through a tall window; the light of a single lamp; soft daylight; late afternoon sun
        neon light from outside; dim light; morning sun through curtains; firelight; cold blue light""",
    "camera": """35mm film photograph; shallow depth of field; wide shot; close-up; seen from above; eye-level shot
        telephoto photograph; black and white photograph; sharp focus; candid photograph; natural colours; low angle
        medium format photograph; documentary photograph; long exposure; photograph with fine film grain""",
    "colour": """red; blue; green; yellow; orange; purple; pink; white; black; brown; grey; turquoise; teal; crimson
        navy blue; mustard yellow; lavender; mint green; coral; beige; olive green; silver; golden; copper""",
    "season": "in spring; in summer; in autumn; in winter",
    "weather": """in the rain; in thick fog; under a clear sky; after a storm; in light snow; on a windy day; in the mist
        under heavy clouds; on a hot afternoon; at dawn; at dusk; in a snowstorm; under a rainbow; on a frosty morning""",
    "place": """Portugal; Japan; Iceland; Morocco; Norway; Peru; Vietnam; Scotland; Kenya; Greece; India; Mexico; Canada
        Italy; New Zealand; Turkey; Argentina; Nepal; Indonesia; Egypt; Georgia; Chile; Austria; South Korea; Senegal""",
    "material": """wood; marble; brass; clay; glass; paper; wool; stone; copper; porcelain; felt; bamboo; iron; ice; jade
        cardboard; wicker; terracotta; leather; silver""",
    "number": "two; three; four; five; six; seven",
}

KINDS = (
    Kind(
        "pets",
        110,
        """@ {coat} {pet} {act}
        @ {coat} {pet} {act}, {camera}
        @ {coat} {pet} {act}, {indoors}
        @ {coat} {pet} {act} while @ {coat} {pet} looks on
        portrait of @ {coat} {pet} on @ {colour} background
        @ {coat} {pet} wearing @ {wear}, studio photograph
        @ {pet} next to @ {thing} on a wooden floor
        @ {coat} {pet} is {act}.
        @ {coat} {pet} {act}, {indoors}, {camera}
        @ {coat} {pet} and @ {coat} {pet} sharing a sofa, one of them {act}, {indoors}""",
        {
            "coat": "black; white; brown; grey; spotted; fluffy; small; old; young; sleepy; curious; long-haired; scruffy",
            "pet": """cat; dog; kitten; puppy; rabbit; hamster; guinea pig; parrot; tabby cat; beagle; greyhound; terrier
                corgi; ginger cat; Siamese cat; sheepdog; dachshund; poodle; canary; ferret""",
            "act": """sleeping on a windowsill; sitting in a cardboard box; looking out of a rainy window
                sitting in the grass; hiding under a blanket; waiting by the front door; lying on a striped rug
                watching a butterfly; sitting on a kitchen chair; exploring a vegetable garden; resting on a pile of laundry
                standing in fresh snow; sitting on a stack of books; peeking out of a basket; sitting beside a fireplace""",
            "wear": """red scarf; knitted sweater; tiny top hat; yellow raincoat; bow tie; flower crown; pair of round glasses
                blue bandana""",
            "thing": "teapot; pair of boots; globe; ball of wool; potted cactus; guitar; toy train; pumpkin; birdcage; bucket",
        },
    ),
    Kind(
        "wild animals",
        150,
        """@ {beast}, {light}
        @ {beast} {season}, {camera}
        wildlife photograph of @ {beast}
        @ {beast} {weather}
        close-up of the eye of @ {animal}
        {number} {herd}
        {herd}, {light}
        @ {animal} made of {material}
        a children's book illustration of @ {animal} {errand}
        @ {animal} and @ {animal} {errand}
        @ {beast}, {camera}
        @ {beast} {season}, {light}, {camera}, every hair and feather in detail
        an illustrated map of a forest on which @ {animal} and @ {animal} are {errand}, ink and watercolour""",
        {
            "beast": """red fox trotting through a birch forest; brown bear catching a salmon in a river
                elephant drinking at a waterhole; lion resting in tall dry grass; giraffe eating from an acacia tree
                zebra crossing a dusty road; owl perched on a mossy branch; kingfisher diving into a pond
                hummingbird at a red flower; octopus on a coral reef; sea turtle gliding over sand; whale breaching offshore
                dolphin leaping over a wave; penguin sliding on ice; polar bear on drifting ice; reindeer pulling at lichen
                hedgehog under fallen leaves; squirrel holding a hazelnut; deer drinking from a stream; wolf on a ridge
                frog on a lily pad; chameleon on a thin branch; gecko on a white wall; snow leopard on a rocky slope
                tiger wading through shallow water; gorilla sitting among ferns; sloth hanging from a vine
                toucan in a rainforest; flamingo standing in a shallow lagoon; pelican on a wooden post; swan on a dark lake
                heron hunting among reeds; eagle above a canyon; bat flying at nightfall; beaver beside its dam
                otter floating on its back; seal sleeping on a rock; jellyfish drifting in deep blue water
                seahorse among sea grass; koala asleep in a eucalyptus tree; kangaroo at the roadside; camel in the dunes
                bee covered in pollen; dragonfly on a reed; snail on a wet leaf; spider in a web with dew drops
                ladybird on a blade of grass; stag beetle on bark; monarch butterfly on a thistle; ant carrying a leaf
                peacock spreading its tail; hare running over a ploughed field; badger leaving its burrow at night""",
            "animal": """fox; bear; owl; hedgehog; elephant; frog; rabbit; crocodile; tortoise; raccoon; walrus; llama
                hippopotamus; mouse; badger; crane; whale; octopus; goose; tiger; moose; lizard; crow; pig; armadillo""",
            "herd": """wild horses galloping along a beach; cranes flying over a marsh; goats climbing a steep cliff
                cows lying in a meadow; sheep on a green hillside; ducklings crossing a path; pigeons on a wire
                seagulls above a fishing boat; swallows under a roof; buffaloes in a river; alpacas behind a fence
                fish in a clear mountain lake; fireflies over a pond; geese in a farmyard""",
            "errand": """having a picnic; repairing a bicycle; rowing a small boat; baking bread; reading under a lamp
                waiting for a bus; playing chess; flying a kite; walking home in the snow; watering flowers
                painting a fence; camping under the stars""",
        },
    ),
    Kind(
        "people",
        190,
        """@ {person}
        @ {person}, {camera}
        @ {person}, {light}
        @ {person} in {place}
        portrait of @ {who}, {light}
        portrait of @ {who} with {feature}, {camera}
        the hands of @ {who}, close-up, {light}
        @ {who} standing in front of @ {colour} wall
        @ {who} {doing} {weather}
        @ {who} and @ {who} {together}
        @ {who} is {doing}.
        {number} {people}
        {people}, {light}
        @ {person} in {place}, {light}, {camera}, with {feature}
        @ {who} with {feature} and @ {who} with {feature} {together} {weather}, {camera}
        a scene in {place}: {people} in the background, and in front @ {who} {doing}, {light}""",
        {
            "person": """elderly fisherman mending a net on a pier; baker taking loaves out of a stone oven
                girl blowing dandelion seeds in a meadow; boy jumping into a lake from a jetty
                cellist practising in an empty hall; potter shaping a bowl on a wheel; surgeon looking at a screen
                blacksmith hammering glowing iron; gardener pruning roses; student asleep over a pile of books
                climber on an overhanging rock face; skateboarder in an empty pool; ballet dancer tying her shoes
                farmer carrying a crate of pumpkins; watchmaker bent over a tiny gear; beekeeper holding a honeycomb frame
                postman cycling down a village street; astronomer beside a large telescope; weaver at a wooden loom
                market seller behind heaps of spices; street musician playing the accordion; sculptor covered in stone dust
                diver swimming above a wreck; firefighter taking off a helmet; conductor raising both arms
                shepherd with a lamb on the shoulders; carpenter planing a plank; teacher drawing a circle on a blackboard
                cook tossing vegetables in a wok; tailor measuring a sleeve; pilot checking a small aeroplane
                grandmother knitting beside a stove; toddler stacking wooden blocks; cyclist on a mountain pass
                runner splashing through a puddle; surfer carrying a board at sunrise; painter in front of a huge canvas
                mechanic under an old van; librarian on a ladder; florist wrapping a bouquet; juggler in a town square
                chess player thinking hard; nurse walking down a long corridor; drummer in a small club""",
            "who": """young woman; young man; old woman; old man; middle-aged woman; middle-aged man; teenager; child
                farmer; dancer; sailor; monk; scientist; bride; musician; hiker; grandfather; factory worker; athlete""",
            "feature": """freckles; a grey beard; curly hair; a wide-brimmed hat; tired eyes; a gentle smile; braided hair
                round glasses; silver earrings; a woollen shawl; rain on the face; a shaved head; laughing eyes
                wind in the hair; a colourful headscarf; paint on the cheeks""",
            "doing": """waiting for a train; reading a newspaper on a bench; carrying an umbrella; drinking tea
                looking out over the sea; riding a horse; chopping wood; hanging up laundry; walking a dog; picking apples
                pushing a bicycle; crossing a bridge; flying a kite; sitting on the steps; eating an ice cream; taking a photo
                feeding pigeons; writing a letter; playing the violin; peeling an orange""",
            "together": """laughing at a kitchen table; dancing in the rain; playing cards; sharing an umbrella
                looking at a map; building a sandcastle; cooking soup; sitting by a campfire; carrying a long ladder
                rowing across a lake; playing table tennis; waiting at a bus stop; repairing a boat""",
            "people": """friends around a long dinner table outdoors; children running down a hill; rowers in a narrow boat
                dancers on a dark stage; workers on a scaffold; players in a muddy football match; hikers on a narrow ridge
                commuters on a crowded platform; musicians in a small orchestra; swimmers in an open-air pool
                old men playing dominoes; women planting rice; people with lanterns at a night festival""",
        },
    ),
    Kind(
        "food",
        150,
        """{dish} on @ {plate}
        {dish} on @ {plate}, {camera}
        {dish}, food photography, {indoors}
        {dish} beside {side}
        overhead view of {dish}, {side} and {side}
        {basket} at a market in {place}
        {basket} on @ {colour} tablecloth
        @ {drink} with {garnish}
        @ {drink} on a café table, {indoors}
        @ {plate} with {dish} and {side}.
        still life with {basket} and @ {drink}, oil painting
        {number} {baked} on a cooling rack
        {dish} on @ {plate} with {side} and {side}, @ {drink} behind it, {indoors}, shallow depth of field
        a long table set for a feast: {dish}, {basket} and @ {drink} with {garnish}, {indoors}""",
        {
            "dish": """spaghetti with basil and tomatoes; a stack of pancakes with blueberries; a steaming bowl of noodle soup
                grilled fish with lemon; an omelette with mushrooms; a slice of apple pie; fried rice with vegetables
                a cheese sandwich cut in half; a roast chicken with potatoes; dumplings in a bamboo steamer; lentil stew
                a salad of figs and walnuts; a pizza with olives; vegetable curry; sushi rolls; tacos with lime; a burger
                stuffed peppers; poached eggs on toast; a fruit tart with raspberries; chocolate cake with cherries
                waffles with whipped cream; paella in a wide pan; pumpkin soup with seeds; baked beans on toast
                falafel with yoghurt; couscous with apricots; a bowl of porridge with honey; a cheese board; gnocchi""",
            "plate": """white plate; blue plate; wooden board; rustic clay plate; dark slate; enamel plate; banana leaf
                silver tray; hand-painted plate; chipped plate""",
            "side": """a glass of water; a folded napkin; fresh herbs; a bowl of olives; sliced bread; a small jug of oil
                half a lemon; a wooden spoon; a bunch of radishes; a jar of pickles; a pepper mill; a candle""",
            "basket": """baskets of ripe tomatoes; a pile of oranges; crates of green apples; bunches of grapes
                a heap of red chillies; loaves of bread; wheels of cheese; rows of fresh fish on ice; bowls of spices
                pears and plums; cut pomegranates; purple cabbages; mushrooms of many kinds; jars of honey; a split watermelon
                garlic in braids; bananas and mangoes; eggs in a straw nest""",
            "drink": """cup of black coffee; glass of lemonade; mug of hot chocolate; pot of green tea; glass of red wine
                cappuccino with a leaf in the foam; glass of iced tea; glass of orange juice; jug of milk; glass of cider
                smoothie in a tall glass""",
            "garnish": """a sprig of mint; a slice of lemon; cinnamon sticks; ice cubes; a paper straw; steam rising
                an almond biscuit beside it; rose petals on the saucer""",
            "baked": """cinnamon buns; croissants; gingerbread hearts; blueberry muffins; pretzels; macarons; scones
                oat biscuits; bread rolls; lemon tarts; jam doughnuts""",
        },
    ),
    Kind(
        "landscapes",
        190,
        """{land} {weather}
        {land}, {light}
        {land}, {camera}
        {land} {season}
        {land} in {place}, {light}
        {land} in {place} {season}
        {land} with {detail}
        {land} with {detail}, {light}
        aerial photograph of {land}
        {land} under {sky}
        a panorama of {land}, {sky}
        {land}, {painting}
        {detail} in front of {land}
        {land} in {place} {season} with {detail} in the foreground and {detail} far away, under {sky}, {light}
        {land} with {detail}, {sky}, {painting}, muted colours and visible brush strokes
        {land} {weather}, {detail} half hidden, {light}, {camera}""",
        {
            "land": """a mountain lake; rolling green hills; a desert with tall dunes; a rocky coast; a pine forest
                a waterfall in a deep gorge; a lavender field; a frozen river; a salt flat; a volcanic crater; a quiet beach
                a terraced rice field; a snow-covered valley; a canyon of red rock; a bamboo grove; a marsh with tall reeds
                a wheat field; an alpine meadow; a glacier; a fjord; a tropical island; a birch forest; a moor with heather
                a vineyard on a slope; cliffs above the sea; a mangrove swamp; a jungle stream; a cherry orchard in bloom
                a field of sunflowers; a stony riverbed; a tundra with moss and lichen; an olive grove; a lagoon; a savannah
                a sea cave; a hot spring; a heath with lone pines; a gravel road through empty plains; a coral island""",
            "detail": """a small wooden cabin; a lone tree; a winding path; grazing sheep; a stone bridge; a red canoe
                a lighthouse; a hot-air balloon; a hiker with a backpack; wild horses; an old windmill; a rowing boat
                a ruined tower; a railway line; a fallen log; a shepherd's hut; a flock of birds; a tent with a light inside
                a campfire; a ferry; power lines; a dry stone wall; a wooden fence; a signpost""",
            "sky": """a starry sky; the Milky Way; northern lights; a full moon; towering clouds; a pink sunset; a pale sky
                lightning; a thin crescent moon; high cirrus clouds; a double rainbow; an orange haze""",
            "painting": """oil painting; watercolour; pastel drawing; ink wash painting; impressionist painting; woodcut
                gouache painting; pencil sketch; acrylic painting with thick strokes; low-poly illustration; pixel art
                vintage travel poster""",
        },
    ),
    Kind(
        "cities",
        160,
        """{street} {weather}
        {street} in {place}
        {street} in {place}, {light}
        {street}, {camera}
        {building} {weather}
        {building} in {place}, {camera}
        {building} made of {material}, architectural photograph
        {building}, {light}
        the inside of {building}, {light}
        {building} reflected in {mirror}
        {street} with {extra}
        {street} with {extra}, {camera}
        a cross-section drawing of {building}
        {street} in {place} {season}, with {extra} and {extra}, {building} at the end of it, {light}
        {building} in {place} {weather}, {extra} in front of it, {light}, {camera}""",
        {
            "street": """a narrow street with laundry lines; a busy crossing with neon signs; a cobbled square
                a row of colourful houses; a canal with moored boats; a street market; a tram turning a corner
                a quiet courtyard with a fountain; rooftops with chimneys; a stairway between old walls; an empty car park
                a park with chestnut trees; a harbour with cranes; an underground station; a skyline across a river
                a village lane; a suburban street with bare trees; a bridge full of cyclists; a bazaar with lamps
                a railway station hall; an alley with graffiti; a promenade by the sea; a roundabout seen from above""",
            "building": """a Gothic cathedral; a concrete library; a glass office tower; a wooden temple; a stone farmhouse
                an art deco cinema; a lighthouse; a greenhouse full of palms; a mosque with blue tiles; a brick factory
                a castle on a hill; a half-timbered inn; a modern museum; a spiral staircase; a water tower; a tea house
                an abandoned theatre; a round tower; a houseboat; a barn; an observatory; a tiny chapel; a covered bridge
                a treehouse; a petrol station; a windmill; a swimming hall; a post office; a bakery with a striped awning""",
            "mirror": "a puddle; a still lake; a shop window; a canal; a wet street; a sunglass lens",
            "extra": """a woman on a bicycle; two parked scooters; a sleeping cat; a red umbrella; a fruit stand
                children playing football; strings of lights; a street lamp; an old blue car; a flower seller
                drying laundry; flocks of pigeons; a man selling newspapers; a delivery van""",
        },
    ),
    Kind(
        "interiors",
        110,
        """@ {style} {room} with {furniture}
        @ {style} {room} with {furniture}, {indoors}
        @ {style} {room} with {furniture} and {furniture}
        @ {room} with {colour} walls and {furniture}
        a corner of @ {style} {room}, {indoors}
        {furniture} in @ {style} {room}, interior photograph
        @ {room} in a house in {place}, {indoors}
        an isometric drawing of @ {style} {room}
        @ {style} {room} with {furniture}.
        @ {style} {room} with {furniture}, {furniture} and {furniture}, {colour} walls, {indoors}, wide shot
        a cat asleep in @ {style} {room} with {furniture}, {indoors}""",
        {
            "style": """minimalist; cosy; rustic; Scandinavian; cluttered; sunlit; Victorian; modern; empty; abandoned
                1970s; Japanese; candlelit; whitewashed; industrial; old-fashioned""",
            "room": """kitchen; living room; bedroom; study; bathroom; attic; library; workshop; dining room; hallway
                conservatory; nursery; café; classroom; music room; pantry; reading nook; pottery studio; laundry room""",
            "furniture": """a green armchair; a long oak table; shelves full of plants; a claw-foot bathtub; an upright piano
                a round rug; a wood-burning stove; a bookcase up to the ceiling; a velvet sofa; copper pans on the wall
                a hammock; a tall window; a spiral staircase; paper lanterns; a rocking chair; a patchwork quilt
                a wall of old photographs; a grandfather clock; an open fireplace; a skylight; a chandelier; a window seat
                a mustard yellow lamp; hanging ferns""",
        },
    ),
    Kind(
        "things",
        170,
        """@ {colour} {thing} on {surface}
        @ {colour} {thing} on {surface}, {indoors}
        @ {old} {thing} on {surface}, {camera}
        @ {thing} made of {material}
        @ {thing} made of {material}, product photograph on @ {colour} background
        {number} {things} in a row
        {number} {colour} {things} on {surface}
        @ {colour} {thing} to the left of @ {colour} {thing}
        @ {thing} on top of @ {colour} {box}
        @ {colour} {thing} inside a glass jar
        @ {old} {thing} next to {number} {things}
        @ {colour} {box} and @ {colour} {thing} on {surface}.
        a technical drawing of @ {thing}
        macro photograph of @ {old} {thing}, {indoors}
        a pile of {things}, {camera}
        still life of @ {old} {thing}, @ {colour} {thing} and {number} {things} on {surface}, {indoors}, dark background
        @ {thing} made of {material} on {surface}, surrounded by {things}, {indoors}, {camera}""",
        {
            "thing": """teapot; alarm clock; bicycle bell; typewriter; violin; lantern; umbrella; pair of scissors; compass
                telescope; wooden chair; leather suitcase; key; chess knight; rubber duck; paper boat; snow globe; camera
                sewing machine; fountain pen; rotary telephone; music box; pocket watch; watering can; toy robot; globe
                hourglass; oil lamp; pair of glasses; spinning top; microscope; gramophone; rucksack; straw hat; trumpet
                ukulele; desk fan; vase; mug; candle; perfume bottle; walnut; seashell; feather; kite; padlock; radio""",
            "things": """marbles; pencils; keys; seashells; buttons; matryoshka dolls; tin soldiers; books; candles; coins
                wine glasses; spools of thread; dice; paper cranes; pebbles; light bulbs; playing cards; paintbrushes
                teacups; toy cars; clothes pegs; postage stamps; wooden spoons; bottles; umbrellas; hats""",
            "surface": """a wooden table; a windowsill; a marble counter; a stack of newspapers; a mossy stone; white sand
                a velvet cushion; a metal shelf; a concrete floor; a blue cloth; a mirror; a pile of autumn leaves; fresh snow
                a garden bench; a piano; a map of the world; a chequered tablecloth; a workbench""",
            "old": "rusty; broken; antique; brand-new; dusty; hand-painted; tiny; oversized; worn; polished; half-finished",
            "box": "box; cube; book; suitcase; drum; crate; cushion; bucket; cylinder; stool; pyramid; basket",
        },
    ),
    Kind(
        "vehicles",
        100,
        """@ {vehicle} {where}
        @ {vehicle} {where}, {light}
        @ {vehicle} {where} {weather}
        @ {colour} {ride} {where}
        @ {colour} {ride} {where}, {camera}
        @ {old} {vehicle}, {light}
        a toy {ride} on a carpet, {camera}
        @ {colour} {ride} overtaking @ {vehicle}
        a poster of @ {vehicle} in {place}, flat colours
        a cutaway illustration of @ {vehicle}
        @ {vehicle} is standing {where}.
        @ {old} {vehicle} {where} {weather}, @ {colour} {ride} parked beside it, {light}, {camera}""",
        {
            "vehicle": """steam locomotive; fishing boat; double-decker bus; vintage sports car; camper van; sailing ship
                tram; cargo bicycle; hot-air balloon; tractor; seaplane; motorcycle with a sidecar; fire engine; canoe
                container ship; cable car; helicopter; submarine; horse-drawn carriage; ice-cream van; biplane; tugboat
                night train; snowplough; airship; gondola; excavator; milk float; paddle steamer; racing bicycle""",
            "ride": "car; scooter; bicycle; van; bus; truck; rowing boat; kayak; skateboard; tricycle; sledge; motorboat",
            "where": """beside a lake; on a mountain road; in front of a petrol station; in a narrow street; at the harbour
                under a bridge; in a field of poppies; on a beach; outside a diner; in a snowy forest; in the desert
                in front of a yellow house; on a foggy morning; near a waterfall; in a repair shop""",
            "old": "rusty; gleaming; overgrown; mud-splashed; freshly painted; old; miniature; futuristic; overloaded",
        },
    ),
    Kind(
        "plants",
        90,
        """{plant}, {light}
        {plant} {weather}
        {plant}, macro photograph
        {plant} in @ {colour} {pot}
        a botanical illustration of {plant}
        {plant} and {plant} in a glass vase
        {plant} growing through {ruin}
        {plant}, {camera}
        a pressed {leaf} on old paper
        frost on @ {leaf}, {camera}
        a path lined with {flowers} {season}
        {plant} in @ {colour} {pot} on a windowsill, {plant} behind it out of focus, {indoors}, {camera}""",
        {
            "plant": """red poppies; a sunflower; white lilies; a cactus in bloom; ferns; purple irises; a bonsai tree
                water lilies; wild roses; lavender; mushrooms on a log; ivy; tulips; a maple branch; orchids; bluebells
                dandelions; pine cones; cherry blossoms; a fig tree; moss; thistles; peonies; magnolias; a venus flytrap
                succulents; daffodils; hydrangeas; an old oak; a lemon tree; reeds; snowdrops; nasturtiums""",
            "flowers": "poppies; lavender; tulips; bluebells; ferns; hydrangeas; sunflowers; cherry trees; lemon trees; roses",
            "pot": "pot; watering can; teacup; bucket; vase; wooden box; enamel bowl; boot",
            "ruin": "a cracked pavement; a broken window; an old bicycle; a rusty fence; a ruined wall; a car wreck",
            "leaf": "leaf; fern; clover; rose; maple leaf; oak leaf; ginkgo leaf; daisy; branch; thistle; seed head",
        },
    ),
    Kind(
        "fantasy and science fiction",
        160,
        """{wonder}
        {wonder}, {art}
        {wonder}, {light}
        {wonder} {weather}
        {wonder} with {being} in the foreground
        {being} in front of {wonder}
        {being} {deed}, {art}
        {being} {deed}
        {being} and {being} {deed}
        concept art of {wonder}
        {being} made of {material}
        a book cover with {being} {deed}
        {wonder} {weather}, {being} and {being} {deed} in the foreground, {art}, highly detailed
        the inside of {wonder}, where {being} is {deed}, {indoors}, {art}""",
        {
            "wonder": """a city floating above the clouds; a library inside a giant tree; an underwater train station
                a castle carved out of ice; a spaceship landing on a frozen moon; a village on the back of a huge turtle
                a glowing forest of mushrooms; a bridge between two planets; a market on Mars; an abandoned space station
                a ship sailing through the desert; a stairway into the sea; a clockwork whale; a garden under a glass dome
                a lighthouse at the edge of the world; a door in the middle of a meadow; a waterfall that flows upwards
                a mountain with a sleeping face; an island shaped like a cat; a house on chicken legs; a river of stars
                a ruined temple overgrown with crystals; a train among the clouds; a solar-powered city full of gardens
                a tower of stacked houses; a moon base at night; a labyrinth of hedges; a kingdom inside a teacup
                a flooded city with boats between the towers; a giant chessboard in the desert; a bakery for dragons""",
            "being": """a small dragon; a friendly robot; an astronaut; a wizard; a knight in worn armour; a mermaid
                a phoenix; a stone giant; a forest spirit; a clockwork bird; a witch with a broom; a griffin; an old alien
                a tiny fairy; a ghost in a bed sheet; a snow queen; a robot gardener; a time traveller; a sea monster
                a fox in a wizard's cloak; a unicorn; a goblin merchant; a cat astronaut; a lantern-headed traveller""",
            "deed": """reading a map; playing the lute; brewing a potion; waiting at a bus stop; crossing a rope bridge
                sleeping on a pile of books; planting a tree; looking up at two moons; baking a cake; fishing from a cloud
                opening a wooden chest; repairing a radio; drinking tea; riding a bicycle; climbing a tower
                following a firefly; painting a portrait; walking through a storm; guarding a gate; counting stars""",
            "art": """digital painting; fantasy illustration; matte painting; storybook illustration; ink drawing
                detailed concept art; 3D render; cel-shaded animation still; pencil drawing; art nouveau poster; pixel art
                science fiction paperback cover; claymation""",
        },
    ),
    Kind(
        "art and design",
        220,
        """{medium} of {motif}
        {medium} of {motif} in {colour} and {colour}
        {medium} of {motif}, {mood}
        {mood} {medium} of {motif}
        {motif}, {technique}
        {motif}, {technique}, {colour} and {colour}
        a seamless pattern of {pattern}
        a seamless pattern of {pattern} on @ {colour} background
        an abstract composition of {shape}, {technique}
        {shape} in {colour}, {colour} and {colour}, {mood}
        a minimalist poster with {motif}
        a flat icon of {motif} on @ {colour} background
        a mosaic of {pattern}
        {medium} of {shape}
        {medium} of {motif} and {motif}, {technique}, {colour} and {colour} on cream paper, {mood}
        {medium} that shows {motif} framed by @ border of {pattern}, {mood}, {colour} and {colour}""",
        {
            "medium": """watercolour; oil painting; charcoal drawing; woodcut; linocut print; ink drawing; pastel drawing
                pencil sketch; gouache painting; fresco; etching; screen print; collage; embroidery; stained-glass window
                paper cutout; ceramic tile; bronze sculpture; chalk drawing; crayon drawing; mural; tapestry""",
            "motif": """a sleeping child; a fishing village; a bowl of lemons; two dancers; an old tree; a running horse
                a harbour at night; a woman at a window; a boat in a storm; a mountain and its reflection; a vase of poppies
                a crowded café; a cat on a chair; a snowy roof; a violin and a bottle; an owl; a lighthouse; a steam train
                a circus tent; a walled garden; a market day; a swimmer; a moonlit road; a chess game; a flock of geese
                an apple; a pair of boots; a whale; a bridge in the fog; a cyclist; a teapot; a sailing ship; a wolf
                a windmill; a winter forest; a hand holding a bird; a lion; a train station; a bee; a mountain hut
                a goldfish in a bowl; a hot-air balloon; a typewriter; a fox in a field; a ladder against a tree""",
            "technique": """thick brush strokes; fine ink lines; flat colours; pointillism; cubist style; art deco style
                impressionist style; expressionist style; baroque lighting; low-poly 3D render; isometric illustration
                pixel art; paper craft; risograph print; long shadows; single continuous line; bauhaus style; surrealism
                vector illustration; cross-hatching; stencil art; gold leaf and ink; soft shading; origami""",
            "mood": """calm; gloomy; cheerful; dreamlike; dramatic; playful; melancholic; mysterious; delicate; bold
                quiet; whimsical""",
            "pattern": """leaves; fish; triangles; lemons; feathers; waves; stars; birds; cats; tulips; mushrooms; shells
                hexagons; bicycles; mountains; umbrellas; strawberries; moths; keys; clouds; pine trees; teacups""",
            "shape": """circles and lines; overlapping squares; flowing ribbons; spirals; broken glass; folded paper
                thin wires; stripes and dots; ripples; cubes; splashes of ink; floating spheres; torn paper; smoke""",
        },
    ),
    Kind(
        "events and sport",
        100,
        """{event} in {place}
        {event}, {camera}
        {event} {weather}
        {event} in {place}, {light}
        {sport}, {camera}
        {sport} {weather}
        {sport} in front of {crowd}
        {event} with {crowd}
        {event} seen from {view}
        {sport} seen from {view}
        a vintage postcard of {event}
        {event} in {place} {season} with {crowd}, seen from {view}, {light}, {camera}""",
        {
            "event": """a lantern festival; a village wedding; a street parade; a winter market; a harvest festival
                a school play; a kite festival; a rock concert; a birthday party in a garden; a flea market; fireworks
                a regatta; a night market; a carnival; a flower show; an outdoor cinema; a sheepdog trial; a picnic
                a brass band concert; a book fair; a hot-air balloon festival; a midsummer bonfire""",
            "sport": """a goalkeeper diving for a ball; a tennis player serving; two fencers; a relay race; a ski jumper
                a bicycle race on cobblestones; a basketball shot; a rowing crew; a sumo match; a gymnast on the bars
                a surfer inside a wave; a boxing match; an ice hockey game; a swimmer at the turn; a long jump
                a rugby scrum; a figure skater; a cricket match; a windsurfer; a judo throw; a polo match""",
            "crowd": """a cheering crowd; empty stands; children with balloons; people under umbrellas; a few spectators
                a dog; a row of photographers; dancing couples""",
            "view": "a balcony; above; the back row; a drone; a hill; a train window; the ground; a rooftop; a doorway",
        },
    ),
    Kind(
        "everyday scenes",
        100,
        """@ {holder} of {contents} on {spot}.
        @ {colour} {seat} in the middle of {ground}.
        @ {holder} of {contents} beside @ {colour} {seat}.
        {number} {group} on {ground}.
        @ {colour} {sign} in front of {ground}, {weather}
        {contents} on {spot}, {light}
        @ {holder} of {contents} on {spot}, {camera}
        @ {colour} {seat} on {ground}, {light}
        {group} on {ground}, {weather}
        @ {holder} of {contents} on {spot}, behind it @ {colour} {seat} and {group}, {light}, {camera}""",
        {
            "holder": "basket; box; bowl; shelf; tray; cart; bucket; crate; jar; bag",
            "contents": """toys; vegetables; old records; wool; tools; fresh flowers; letters; apples; firewood; shoes
                bread rolls; paint tubes; coloured chalk; clean towels; onions; postcards""",
            "spot": """a kitchen counter; the back seat of a car; a doorstep; a market stall; a garden table; a bicycle rack
                a train seat; an ironing board; a balcony; a park bench; a hospital trolley; a school desk""",
            "seat": """bench; folding chair; sofa; suitcase; umbrella; tent; phone box; letterbox; bicycle; wheelbarrow; ladder
                swing; piano; fire hydrant""",
            "ground": """an empty street; a lawn; a parking lot; a snowy field; a beach; a playground; a train platform
                a forest path; a flooded road; a rooftop; a football pitch; a pier; a meadow; a courtyard""",
            "group": """children in rubber boots; people in raincoats; dogs of different sizes; parked bicycles; folding chairs
                market stalls; people waiting with suitcases; ducks; shopping trolleys; traffic cones""",
            "sign": "door; bus stop; ticket booth; garden gate; kiosk; caravan; lamp post; stop sign; flag; shed",
        },
    ),
)
